"""The features cache: what the frozen encoders say of every window, computed once, read at random.

A cache is a TensorFlow Datasets folder of array_record shards, written and read without TensorFlow
and without a network, with `wanjax.json` beside the shards: the shapes, the fingerprint of all that
every window depends on, the origin of each (its film, place and caption), the files' sizes. Any
TFDS reader opens the folder by `tfds.builder_from_directory(OUT)`; `feature_writer` writes it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from wanjax.errors import UserError, nearest
from wanjax.outputs import replaced
from wanjax.types import PathLike

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

FORMAT = 2
READABLE = (1, 2)  # format 1 kept no origins of its windows
MANIFEST = "wanjax.json"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

Example = dict[str, Any]  # the arrays of one window (None where the model has none), name, caption


@dataclass(frozen=True)
class FeatureSpec:
    """Shapes of one window's features: `t h w 16`, `L C`, `t h w 20`, `S 1280`; and their type.

    Text is stored at each prompt's true length, and padded with zeros to `L` on reading.
    """

    latents: tuple[int, ...]
    text: tuple[int, ...]
    condition: tuple[int, ...] | None = None
    image: tuple[int, ...] | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"There is no feature type '{self.dtype}'{nearest(self.dtype, DTYPES)}")

    @property
    def stored(self) -> dict[str, tuple[int | None, ...]]:
        """Shapes as they are stored, by name."""
        shapes = {"latents": self.latents, "text": (None, self.text[1])}
        optional = {"condition": self.condition, "image": self.image}
        return shapes | {name: shape for name, shape in optional.items() if shape is not None}


@dataclass(frozen=True)
class Origin:
    """What the features of one window depend on, besides what all have in common.

    `film` is a hash of the film's content, `start` and `fps` (the film's own rate) are in seconds,
    `size` is the film's height and width as shown.
    """

    split: str
    caption: str
    film: str
    start: float
    size: tuple[int, int]
    fps: float

    def same_pictures(self, other: "Origin | None") -> bool:
        """Whether what the VAE and CLIP say is the same."""
        return other is not None and (self.film, self.start) == (other.film, other.start)


@dataclass(frozen=True)
class Source:
    """Random access to one split, as grain wants it: examples with their text padded to `L`."""

    records: Any
    spec: FeatureSpec
    path: Path

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.record(index)
        text = np.zeros(self.spec.text, DTYPES[self.spec.dtype])
        text[: len(record["text"])] = record["text"]
        example = {"condition": None, "image": None, **record, "text": text}
        return example | {key: record[key].decode() for key in ("name", "caption")}

    def record(self, index: int) -> Example:
        """One window as it is stored: its text at its true length, name and caption in bytes."""
        try:
            return self.records[index]
        except Exception as error:  # array_record and its decoder raise whatever they like
            raise UserError(
                f"Window {index} in {self.path} cannot be read ({error}); encode it again."
            ) from error


class Features:
    """An opened cache: `spec`, `fingerprint`, `splits` (windows in each), and the examples.

    `origins` are those of the windows (None in a cache of format 1); the fingerprint has a hash of
    them.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], builder: "tfds.core.DatasetBuilder"):
        self.path, self._builder = path, builder
        self._sources: dict[str, Source] = {}
        spec = manifest["spec"].items()
        self.spec = FeatureSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in spec})
        self.common = flat(manifest)  # what all windows depend on
        self.fingerprint: dict[str, Any] = manifest["fingerprint"]
        windows = manifest["windows"] if manifest["format"] > 1 else manifest["names"]
        self.splits: dict[str, int] = {split: len(names) for split, names in windows.items()}
        self.names: dict[str, tuple[str, int]] = {
            name: (split, index)
            for split, names in windows.items()
            for index, name in enumerate(names)
        }
        self.origins: dict[str, Origin] | None = None
        if manifest["format"] > 1:
            self.origins = {
                name: Origin(split, **facts | {"size": tuple(facts["size"])})
                for split, named in windows.items()
                for name, facts in named.items()
            }
            digest = hashlib.sha256(json.dumps(windows).encode()).hexdigest()[:16]
            self.fingerprint = self.fingerprint | {"windows": digest}

    @classmethod
    def open(cls, path: PathLike) -> "Features":
        """Open what `encode.py` made. Raises `UserError` for anything else, or less than all."""
        path = Path(path)
        begun = path.with_name(f"{path.name}.staging").exists() or replaced(path).exists()
        if begun and not path.exists():
            raise UserError(f"{path} is only half encoded; run the same encode.py command again.")
        if not (path / MANIFEST).is_file():
            what = "is no features cache" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}; make one by encode.py.")
        manifest = read_manifest(path / MANIFEST, READABLE)
        for name, size in manifest["files"].items():
            file = path / name
            if not file.is_file() or file.stat().st_size != size:
                found = f"{file.stat().st_size:,}" if file.is_file() else "none"
                raise UserError(
                    f"{file} has {found} of its {size:,} bytes; "
                    f"copy {path} again, or remove it and encode again."
                )
        return cls(path, manifest, import_tfds().builder_from_directory(str(path)))

    def __len__(self) -> int:
        return len(self.names)

    def require(self, expected: Mapping[str, Any]) -> None:
        """Refuse a cache made under other circumstances, naming the field that differs.

        `expected` maps fields of the fingerprint, or `spec`, to what the caller has now.
        """
        own = {"spec": asdict(self.spec), **self.fingerprint}
        refuse_difference({key: own.get(key) for key in expected}, dict(expected), self.path)

    def source(self, split: str = "train") -> Source:
        """The windows of one split. Raises `UserError` naming those there are."""
        if split not in self.splits:
            raise UserError(f"{self.path} has no split '{split}'{nearest(split, self.splits)}")
        if split not in self._sources:
            records = self._builder.as_data_source(split=split)
            self._sources[split] = Source(records, self.spec, self.path)
        return self._sources[split]

    def example(self, name: str) -> Example:
        """The window called `name`. Raises `UserError` with the nearest names."""
        if name not in self.names:
            raise UserError(f"{self.path} has no window '{name}'{nearest(name, self.names)}")
        split, index = self.names[name]
        return self.source(split)[index]

    def record(self, name: str) -> Example:
        """The window called `name`, as it is stored."""
        split, index = self.names[name]
        return self.source(split).record(index)


def import_tfds() -> Any:
    """tensorflow_datasets, imported when it is needed: that takes most of a second."""
    import tensorflow_datasets

    return tensorflow_datasets


def read_manifest(file: Path, formats: tuple[int, ...]) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_text())
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged; remove {file.parent} and encode again.") from error
    if version not in formats:
        readable = " and ".join(map(str, formats))
        raise UserError(
            f"{file.parent} has format {version} and this program reads {readable}; "
            "remove it and encode again."
        )
    return manifest


def flat(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"spec": manifest["spec"], **manifest["fingerprint"]}


def refuse_difference(then: dict[str, Any], now: dict[str, Any], place: Path) -> None:
    then, now = (json.loads(json.dumps(values)) for values in (then, now))  # tuples are lists
    for field, before, after in _differences(then, now):
        raise UserError(
            f"{place} was encoded with {field} = {json.dumps(before)} and now it is "
            f"{json.dumps(after)}; restore that, or encode into another --out."
        )


def _differences(then: Any, now: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*then, *now]):
            inner = f"{field}.{key}" if field else str(key)
            yield from _differences(then.get(key), now.get(key), inner)
    elif then != now:
        yield field, then, now
