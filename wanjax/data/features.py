"""The features cache: what the frozen encoders say of every window, computed once, read at random.

While encoding, each window is a file of its own in `OUT.staging`, so an interrupted run goes on
where it stopped. `finish` turns them into a TensorFlow Datasets folder of array_record shards,
written and read without TensorFlow and without a network, with `wanjax.json` beside the shards: the
shapes, the fingerprint of all that the features depend on, the windows' names, the files' sizes.
Any TFDS reader opens the folder by `tfds.builder_from_directory(OUT)`.

`tfds.core.SequentialWriter` writes it, not a `GeneratorBasedBuilder`: that one spills splits above
1 GB through TensorFlow's file functions, and wants its code registered under a global name.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from jaxtyping import Array, Float
from safetensors.numpy import save

from wanjax.errors import UserError, nearest
from wanjax.outputs import require_writable, whole_file, whole_folder
from wanjax.progress import progress_bar
from wanjax.tensor_files import read_safetensors
from wanjax.types import PathLike

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

FORMAT = 1
MANIFEST = "wanjax.json"
NAME = "wanjax_features"
SHARD_BYTES = 256 << 20
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

AnyArray = np.ndarray | Array
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


class FeatureWriter:
    """Collects the features of windows at `out`; what an earlier run did is kept.

    `fingerprint` (JSON values) holds all that the features depend on: checkpoint, preprocessing,
    sizes, captions. Raises `UserError`, naming the field, if an earlier run at `out` had another.
    """

    def __init__(self, out: PathLike, spec: FeatureSpec, fingerprint: Mapping[str, Any]):
        self.out, self.spec = Path(out), spec
        self.staging = self.out.with_name(f"{self.out.name}.staging")
        self.fingerprint = json.loads(json.dumps(fingerprint))
        if self.out.exists() and not (self.out / MANIFEST).is_file():
            raise UserError(f"{self.out} exists and is no features cache; choose another --out.")
        self._whole = Features.open(self.out) if self.out.exists() else None
        self._begun = self.staging / MANIFEST
        self._header = {"format": FORMAT, "spec": asdict(spec), "fingerprint": self.fingerprint}
        if self._whole:
            self._whole.require(_flat(self._header))
            shutil.rmtree(self.staging, ignore_errors=True)  # of a run killed at its very end
        elif self._begun.is_file():
            begun = _read_manifest(self._begun)
            _refuse_difference(_flat(begun), _flat(self._header), self.staging)
        require_writable(self._begun)

    def done(self, name: str) -> bool:
        """Whether the window `name` need not be encoded again."""
        if self._whole:
            return name in self._whole.names
        return self._staged(name).is_file()

    def add(
        self,
        name: str,
        split: str,
        caption: str,
        *,
        latents: Float[AnyArray, "t h w C"],
        text: Float[AnyArray, "n C2"],
        condition: Float[AnyArray, "t h w C3"] | None = None,
        image: Float[AnyArray, "S C4"] | None = None,
    ) -> None:
        """Keep one window's features; `text` has its true length. Raises `UserError` for NaN."""
        if self._whole:
            raise UserError(f"{self.out} is finished and has no {name}; choose another --out.")
        given = {"latents": latents, "text": text, "condition": condition, "image": image}
        arrays = {
            key: _checked(array, key, self.spec, name)
            for key, array in given.items()
            if array is not None
        }
        if arrays.keys() != self.spec.stored.keys():
            raise ValueError(f"{name}: got {sorted(arrays)} for {sorted(self.spec.stored)}")
        metadata = {"name": name, "split": split, "caption": caption}
        if not self._begun.is_file():  # not earlier: an encode that fails before leaves nothing
            with whole_file(self._begun, replace=True) as partial:
                partial.write_text(json.dumps(self._header))
        with whole_file(self._staged(name), replace=True) as partial:
            partial.write_bytes(save(arrays, metadata))

    def finish(self) -> "Features":
        """Make the data set of what is staged, whole or not at all, and remove the staging."""
        if self._whole:
            return self._whole
        staged = self._by_split()
        if not staged:
            raise UserError(f"Nothing was encoded into {self.staging}; give a data set of films.")
        with whole_folder(self.out) as folder:
            self._write(folder, staged)
            manifest = {
                "format": FORMAT,
                "spec": asdict(self.spec),
                "fingerprint": self.fingerprint,
                "names": {split: list(files) for split, files in staged.items()},
                "files": {f.name: f.stat().st_size for f in sorted(folder.iterdir())},
            }
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(self.staging)
        self._whole = Features.open(self.out)
        return self._whole

    def _staged(self, name: str) -> Path:
        # A digest, since a window's name may be no file name.
        digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        return self.staging / f"{digest}.safetensors"

    def _by_split(self) -> dict[str, dict[str, Path]]:
        files: dict[str, dict[str, Path]] = {}
        for file in self.staging.glob("*.safetensors"):
            metadata = read_safetensors(file).metadata
            files.setdefault(metadata["split"], {})[metadata["name"]] = file
        return {split: dict(sorted(files[split].items())) for split in sorted(files)}

    def _write(self, folder: Path, staged: dict[str, dict[str, Path]]) -> None:
        tfds = _tfds()
        dtype, encoding = DTYPES[self.spec.dtype], tfds.features.Encoding.BYTES
        features = {
            key: tfds.features.Tensor(shape=shape, dtype=dtype, encoding=encoding)
            for key, shape in self.spec.stored.items()
        }
        texts = {"name": tfds.features.Text(), "caption": tfds.features.Text()}
        identity = tfds.core.dataset_info.DatasetIdentity(
            name=NAME, version=tfds.core.Version(f"{FORMAT}.0.0"), data_dir=str(folder),
            module_name=__name__,
        )  # fmt: skip
        info = tfds.core.DatasetInfo(
            builder=identity,
            description="Latents and conditions of video windows, encoded by Wan2.1's encoders.",
            features=tfds.features.FeaturesDict(features | texts),
        )
        files = [(split, file) for split, named in staged.items() for file in named.values()]
        per_shard = max(1, SHARD_BYTES // max(file.stat().st_size for _, file in files))
        writer = tfds.core.SequentialWriter(info, per_shard, file_format="array_record")
        writer.initialize_splits(list(staged))
        with progress_bar("writing the features", len(files)) as bar:
            for split, file in files:
                stored = read_safetensors(file)
                texts = {key: stored.metadata[key] for key in ("name", "caption")}
                writer.add_examples({split: [{**stored.tensors, **texts}]})
                bar.advance()
        writer.close_all()


@dataclass(frozen=True)
class Source:
    """Random access to one split, as grain wants it: examples with their text padded to `L`."""

    records: Any
    spec: FeatureSpec
    path: Path

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self.records[index]
        except Exception as error:  # array_record and its decoder raise whatever they like
            raise UserError(
                f"Window {index} in {self.path} cannot be read ({error}); encode it again."
            ) from error
        text = np.zeros(self.spec.text, DTYPES[self.spec.dtype])
        text[: len(record["text"])] = record["text"]
        example = {"condition": None, "image": None, **record, "text": text}
        return example | {key: record[key].decode() for key in ("name", "caption")}


class Features:
    """An opened cache: `spec`, `fingerprint`, `splits` (windows in each), and the examples."""

    def __init__(self, path: Path, manifest: dict[str, Any], builder: "tfds.core.DatasetBuilder"):
        self.path, self._builder = path, builder
        self._sources: dict[str, Source] = {}
        spec = manifest["spec"].items()
        self.spec = FeatureSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in spec})
        self.fingerprint: dict[str, Any] = manifest["fingerprint"]
        self.splits: dict[str, int] = {s: len(names) for s, names in manifest["names"].items()}
        self.names: dict[str, tuple[str, int]] = {
            name: (split, index)
            for split, names in manifest["names"].items()
            for index, name in enumerate(names)
        }

    @classmethod
    def open(cls, path: PathLike) -> "Features":
        """Open what `encode.py` made. Raises `UserError` for anything else, or less than all."""
        path = Path(path)
        if path.with_name(f"{path.name}.staging").exists() and not path.exists():
            raise UserError(f"{path} is only half encoded; run the same encode.py command again.")
        if not (path / MANIFEST).is_file():
            what = "is no features cache" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}; make one by encode.py.")
        manifest = _read_manifest(path / MANIFEST)
        for name, size in manifest["files"].items():
            file = path / name
            if not file.is_file() or file.stat().st_size != size:
                found = f"{file.stat().st_size:,}" if file.is_file() else "none"
                raise UserError(
                    f"{file} has {found} of its {size:,} bytes; "
                    f"copy {path} again, or remove it and encode again."
                )
        return cls(path, manifest, _tfds().builder_from_directory(str(path)))

    def __len__(self) -> int:
        return len(self.names)

    def require(self, expected: Mapping[str, Any]) -> None:
        """Refuse a cache made under other circumstances, naming the field that differs.

        `expected` maps fields of the fingerprint, or `spec`, to what the caller has now.
        """
        own = {"spec": asdict(self.spec), **self.fingerprint}
        _refuse_difference({key: own.get(key) for key in expected}, dict(expected), self.path)

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


def _checked(array: AnyArray, key: str, spec: FeatureSpec, name: str) -> np.ndarray:
    array, shape = np.asarray(array), spec.stored.get(key, ())
    fits = len(shape) == array.ndim and all(n in (None, m) for n, m in zip(shape, array.shape))
    if not fits or (key == "text" and len(array) > spec.text[0]):
        raise ValueError(f"{name}: {key} has shape {array.shape}, not {shape}, of {spec}")
    if not np.isfinite(array.astype(np.float32)).all():
        raise UserError(
            f"The {key} of {name} hold NaN or infinity; check the checkpoint, or encode in float32."
        )
    return np.ascontiguousarray(array.astype(DTYPES[spec.dtype]))


def _tfds() -> Any:
    """tensorflow_datasets, imported when it is needed: that takes most of a second."""
    import tensorflow_datasets

    return tensorflow_datasets


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_text())
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged; remove {file.parent} and encode again.") from error
    if version != FORMAT:
        raise UserError(
            f"{file.parent} has format {version} and this program reads {FORMAT}; encode again."
        )
    return manifest


def _flat(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"spec": manifest["spec"], **manifest["fingerprint"]}


def _refuse_difference(then: dict[str, Any], now: dict[str, Any], place: Path) -> None:
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
