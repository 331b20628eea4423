"""Writing a features cache: what is new is encoded, what is there is kept.

While encoding, each window and each caption is a file of its own in `OUT.staging`, so an
interrupted run goes on where it stopped. `finish` turns them into a TensorFlow Datasets folder of
array_record shards (`wanjax.data.features`). When films or captions have changed, a finished cache
is made anew from what it holds and from what had to be encoded.

`tfds.core.SequentialWriter` writes it, not a `GeneratorBasedBuilder`: that one spills splits above
1 GB through TensorFlow's file functions, and wants its code registered under a global name.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float
from safetensors.numpy import save

from wanjax.data.features import (
    DTYPES,
    FORMAT,
    MANIFEST,
    Features,
    FeatureSpec,
    Origin,
    flat,
    import_tfds,
    read_manifest,
    refuse_difference,
)
from wanjax.errors import UserError, some
from wanjax.outputs import put_back, require_writable, whole_file, whole_folder
from wanjax.progress import progress_bar
from wanjax.tensor_files import read_safetensors
from wanjax.types import PathLike

NAME = "wanjax_features"
SHARD_BYTES = 256 << 20

AnyArray = np.ndarray | Array


class FeatureWriter:
    """Collects the features of `windows` (name → origin) at `out`; what is there is kept.

    `fingerprint` (JSON values) holds what the features of every window depend on: checkpoint,
    preprocessing, sizes. Raises `UserError`, naming the field, if what is at `out` had another, and
    for a cache that has none of the windows.
    """

    def __init__(
        self,
        out: PathLike,
        spec: FeatureSpec,
        fingerprint: Mapping[str, Any],
        windows: Mapping[str, Origin],
    ):
        self.out, self.spec, self.windows = Path(out), spec, dict(windows)
        self.staging = self.out.with_name(f"{self.out.name}.staging")
        self.fingerprint = json.loads(json.dumps(fingerprint))
        put_back(self.out)
        if self.out.exists() and not (self.out / MANIFEST).is_file():
            raise UserError(f"{self.out} exists and is no features cache; choose another --out.")
        self._kept = Features.open(self.out) if self.out.exists() else None
        self._begun = self.staging / MANIFEST
        self._header = {"format": FORMAT, "spec": asdict(spec), "fingerprint": self.fingerprint}
        if self._kept:
            self._check_kept(self._kept)
        if self._begun.is_file():
            begun = read_manifest(self._begun, (FORMAT,))
            refuse_difference(flat(begun), flat(self._header), self.staging)
        require_writable(self._begun)

    def _check_kept(self, kept: "Features") -> None:
        if kept.origins is None:
            raise UserError(
                f"{self.out} was encoded by an earlier wanjax and can be trained on, but not added "
                "to; encode into another --out."
            )
        refuse_difference(kept.common, flat(self._header), self.out)
        if not kept.origins.keys() & self.windows.keys():
            raise UserError(
                f"{self.out} has none of the windows asked for, but {some(list(kept.origins))}; "
                "choose another --out."
            )

    def changes(self) -> list[str]:
        """What is new, different or gone since the cache was finished, a line for each kind."""
        if self._kept is None:
            return []
        then, now = self._kept.origins, self.windows
        both = [name for name in now if name in then]
        kinds = {
            "new": [name for name in now if name not in then],
            "of another film": [n for n in both if not now[n].same_pictures(then[n])],
            "with another caption": [n for n in both if now[n].caption != then[n].caption],
            "of another split": [n for n in both if now[n].split != then[n].split],
            "gone": [name for name in then if name not in now],
        }
        return [f"{len(names)} {kind}: {some(names)}" for kind, names in kinds.items() if names]

    def captions(self) -> list[str]:
        """The captions that are yet to be encoded."""
        wanted = dict.fromkeys(origin.caption for origin in self.windows.values())
        return [c for c in wanted if c not in self._kept_captions and not self._text(c).is_file()]

    def names(self) -> list[str]:
        """The windows that are yet to be encoded."""
        return [
            name
            for name in self.windows
            if not self._is_kept(name) and not self._pictures(name).is_file()
        ]

    def add_caption(self, caption: str, text: Float[AnyArray, "n C"]) -> None:
        """Keep one caption's features, at their true length. Raises `UserError` for NaN."""
        self._stage(self._text(caption), {"text": _checked(text, "text", self.spec, caption)})

    def add(
        self,
        name: str,
        *,
        latents: Float[AnyArray, "t h w C"],
        condition: Float[AnyArray, "t h w C3"] | None = None,
        image: Float[AnyArray, "S C4"] | None = None,
    ) -> None:
        """Keep what the VAE and CLIP say of a window. Raises `UserError` for NaN."""
        given = {"latents": latents, "condition": condition, "image": image}
        arrays = {
            key: _checked(array, key, self.spec, name)
            for key, array in given.items()
            if array is not None
        }
        if arrays.keys() != self.spec.stored.keys() - {"text"}:
            raise ValueError(f"{name}: got {sorted(arrays)} for {sorted(self.spec.stored)}")
        self._stage(self._pictures(name), arrays)

    def finish(self) -> "Features":
        """Make the data set of all windows that are encoded, whole or not at all, and remove the
        staging. What the cache had before and is not among the windows goes."""
        missing = {*self.names()}
        origins = {name: origin for name, origin in self.windows.items() if name not in missing}
        if not origins:
            raise UserError(f"Nothing was encoded into {self.staging}; give a data set of films.")
        if self._kept is None or self._kept.origins != origins:
            with whole_folder(self.out, replace=self._kept is not None) as folder:
                self._write(folder, origins)
            self._kept = Features.open(self.out)
        shutil.rmtree(self.staging, ignore_errors=True)
        return self._kept

    @cached_property
    def _kept_captions(self) -> dict[str, str]:
        """For each caption in the finished cache, a window that has it."""
        origins = self._kept.origins if self._kept else {}
        return {origin.caption: name for name, origin in origins.items()}

    def _is_kept(self, name: str) -> bool:
        return bool(self._kept) and self.windows[name].same_pictures(self._kept.origins.get(name))

    def _text(self, caption: str) -> Path:
        return self._staged("caption", caption)

    def _pictures(self, name: str) -> Path:
        origin = self.windows[name]
        return self._staged("window", json.dumps([name, origin.film, origin.start]))

    def _staged(self, kind: str, key: str) -> Path:
        # A digest, since a window's name may be no file name.
        digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self.staging / f"{kind}-{digest}.safetensors"

    def _stage(self, file: Path, arrays: dict[str, np.ndarray]) -> None:
        if not self._begun.is_file():  # not earlier: an encode that fails before leaves nothing
            with whole_file(self._begun, replace=True) as partial:
                partial.write_text(json.dumps(self._header))
        with whole_file(file, replace=True) as partial:
            partial.write_bytes(save(arrays))

    def _arrays(self, name: str) -> dict[str, np.ndarray]:
        """A window's features, as they are stored."""
        caption = self.windows[name].caption
        if self._is_kept(name):
            kept = self._kept.record(name)
            arrays = {key: kept[key] for key in self.spec.stored}
        else:
            arrays = dict(read_safetensors(self._pictures(name)).tensors)
        if self._text(caption).is_file():
            return arrays | dict(read_safetensors(self._text(caption)).tensors)
        return arrays | {"text": self._kept.record(self._kept_captions[caption])["text"]}

    def _write(self, folder: Path, origins: dict[str, Origin]) -> None:
        splits: dict[str, dict[str, Origin]] = {}
        for name, origin in sorted(origins.items(), key=lambda item: (item[1].split, item[0])):
            splits.setdefault(origin.split, {})[name] = origin
        writer = self._shard_writer(folder)
        writer.initialize_splits(list(splits))
        with progress_bar("writing the features", len(origins)) as bar:
            for split, windows in splits.items():
                for name, origin in windows.items():
                    facts = {"name": name, "caption": origin.caption}
                    facts |= {"source_size": origin.size, "source_fps": origin.fps}
                    writer.add_examples({split: [self._arrays(name) | facts]})
                    bar.advance()
        writer.close_all()
        manifest = self._header | {
            "windows": {
                split: {name: _without_split(origin) for name, origin in windows.items()}
                for split, windows in splits.items()
            },
            "files": {f.name: f.stat().st_size for f in sorted(folder.iterdir())},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))

    def _shard_writer(self, folder: Path) -> Any:
        tfds = import_tfds()
        dtype, encoding = DTYPES[self.spec.dtype], tfds.features.Encoding.BYTES
        shapes = self.spec.stored
        features = {
            key: tfds.features.Tensor(shape=shape, dtype=dtype, encoding=encoding)
            for key, shape in shapes.items()
        } | {
            "name": tfds.features.Text(),
            "caption": tfds.features.Text(),
            "source_size": tfds.features.Tensor(shape=(2,), dtype=np.int32),
            "source_fps": tfds.features.Scalar(dtype=np.float32),
        }
        identity = tfds.core.dataset_info.DatasetIdentity(
            name=NAME, version=tfds.core.Version(f"{FORMAT}.0.0"), data_dir=str(folder),
            module_name=__name__,
        )  # fmt: skip
        info = tfds.core.DatasetInfo(
            builder=identity,
            description="Latents and conditions of video windows, encoded by Wan2.1's encoders.",
            features=tfds.features.FeaturesDict(features),
        )
        numbers = sum(math.prod(shape) for shape in (shapes | {"text": self.spec.text}).values())
        per_shard = max(1, SHARD_BYTES // (numbers * dtype.itemsize))
        return tfds.core.SequentialWriter(info, per_shard, file_format="array_record")


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


def _without_split(origin: Origin) -> dict[str, Any]:
    return {key: value for key, value in asdict(origin).items() if key != "split"}
