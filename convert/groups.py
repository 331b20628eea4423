"""Files of weights in a folder, and which of them make a network together.

Files are told apart by the names of their tensors, so loose files may be called anything. Nothing
is copied here: tensors are views of mapped files.
"""

import json
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.networks import recognise
from convert.torch_files import read_torch
from wanjax.errors import UserError, some
from wanjax.tensor_files import read_safetensors
from wanjax.text_files import read_text

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", ".sft", *TORCH_SUFFIXES)
# Names the shards of a network: `model.safetensors.index.json`, of a variant `...index.fp16.json`.
_INDEX = re.compile(r"^(?P<stem>.+)\.(?P<kind>safetensors|bin)\.index(?P<variant>\.\w+)?\.json$")
_SHARD = re.compile(r"-\d{5}-of-(?!00001\.)\d{5}\.")
# The same weights in another precision, or averaged over the training.
_VARIANT = re.compile(r"\.(fp\d+\w*|bf16|(non_)?ema)$")
# In the names of official files, the network that they hold.
_OFFICIAL_HINTS = {"vae": "vae", "models_t5": "text_encoder", "models_clip": "image_encoder"}


@dataclass(frozen=True)
class Group:
    """The files of one network: tensors by name, and the metadata of a safetensors file."""

    path: Path
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]


def read_networks(path: Path, only: Collection[str] = ()) -> dict[str, Group]:
    """The files of a folder by network, or the one file that `path` is.

    What is no network of Wan2.1 is skipped with a warning, and so is a variant (`model.fp16`, or a
    `.bin`) of a file that is there. Two other files of one network are refused.
    """
    found: dict[str, tuple[Path, Group]] = {}
    skipped = []
    for place in _without_variants(find_groups(path, only)):
        _refuse_lone_shard(place)
        group = _read_or_skip(place, path)
        if group is None:
            continue
        known = recognise(group.tensors)
        if known is None:
            skipped.append(place)
        elif only and known[0] not in only:
            continue
        elif known[0] in found:
            raise _two_files(path, known[0], found[known[0]][0], place)
        else:
            found[known[0]] = (place, group)
    if skipped and not path.is_dir():
        first = next(iter(group.tensors), None)
        raise UserError(
            f"{path} is not a network of Wan2.1 (its first tensor is '{first}'); "
            f"see `python -m convert inspect {path}`."
        )
    _say_skipped(path, skipped, "which is no network of Wan2.1")
    return {network: group for network, (_, group) in found.items()}


def _without_variants(places: Sequence[Path]) -> list[Path]:
    """The places that are not the same weights again, in a form less plain than one beside it."""
    kept = [p for p in places if not any(_is_variant(p, of=other) for other in places)]
    for place in places:
        if place not in kept:
            _say_skipped(place.parent, [place], "since the plain file is there")
    return kept


def _is_variant(place: Path, of: Path) -> bool:
    """Whether the names say so: `model.fp16.safetensors` of `model.safetensors`, a `.bin` or a lone
    file of safetensors or shards of the same name."""
    if place.parent != of.parent or place == of:
        return False
    (stem, *form), (plain, *plain_form) = _form(place), _form(of)
    return _VARIANT.sub("", stem) == plain and (stem != plain or form > plain_form)


def _form(place: Path) -> tuple[str, bool, bool]:
    """A file's name without its format; whether the format is torch's; whether it is no index."""
    index = _INDEX.match(place.name)
    if index is None:
        stem, is_torch = place.stem, place.suffix in TORCH_SUFFIXES
    else:
        stem, is_torch = index["stem"] + (index["variant"] or ""), index["kind"] == "bin"
    return stem.removeprefix("pytorch_"), is_torch, index is None


def _read_or_skip(place: Path, path: Path) -> Group | None:
    """A group; None for a torch file that cannot be read and need not be of the checkpoint (a
    trainer's `optimizer.bin`), which a warning then names."""
    try:
        return read_group(place)
    except UserError as error:
        _, is_torch, _ = _form(place)
        if not path.is_dir() or not is_torch or _hinted(place) is not None:
            raise
        warnings.warn(f"skipped: {error}", stacklevel=2)
        return None


def _refuse_lone_shard(place: Path) -> None:
    """A shard that no index names is a part of a network, which may look like the whole."""
    if _SHARD.search(place.name):
        stem = _SHARD.split(place.name)[0]
        raise UserError(
            f"{place} is one shard of several; fetch the {stem}.safetensors.index.json that names "
            "them all and give the folder, or remove the shard."
        )


def _two_files(path: Path, network: str, first: Path, second: Path) -> UserError:
    names = " and ".join(str(place.relative_to(path)) for place in (first, second))
    return UserError(
        f"{path} holds two files of the {network}, {names}; leave one, or give a single file."
    )


def _say_skipped(folder: Path, places: Sequence[Path], reason: str) -> None:
    if places:
        names = some([str(place.relative_to(folder)) for place in places])
        warnings.warn(f"skipped in {folder}: {names}, {reason}.", stacklevel=3)


def find_groups(path: Path, only: Collection[str] = ()) -> list[Path]:
    """What in a folder makes a network each: indices, for the shards they name, and lone files.

    Official files whose names say that they are not in `only` are left out, and so is what is
    hidden (`._NAME` beside every file, from a Mac). Folders inside are looked through as well, to
    the depth that ComfyUI's have.
    """
    if not path.is_dir():
        return [path]
    files = [
        file
        for pattern in ("*", "*/*", "*/*/*")
        for file in sorted(path.glob(pattern))
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    indices = [f for f in files if _INDEX.match(f.name)]
    taken = {i.parent / name for i in indices for name in _weight_map(i).values()}
    found = list(indices)
    for file in files:
        hint = _hinted(file)
        unwanted = only and hint is not None and hint not in only
        if file.suffix in SUFFIXES and file.is_file() and file not in taken and not unwanted:
            found.append(file)
    return found


def _hinted(file: Path) -> str | None:
    """The network that an official file's name says."""
    return next((n for k, n in _OFFICIAL_HINTS.items() if k in file.name.lower()), None)


def read_group(path: Path) -> Group:
    """The tensors of a file, or of the shards of an index."""
    if _INDEX.match(path.name):
        return _read_shards(path)
    if not path.exists():
        raise UserError(f"There is no file '{path}'; check its name.")
    if path.suffix in TORCH_SUFFIXES:
        return Group(path, read_torch(path), {})
    if path.suffix in SUFFIXES:
        file = read_safetensors(path)
        return Group(path, file.tensors, file.metadata)
    raise UserError(
        f"{path} is neither a safetensors nor a .pth file; give one of these, or a folder."
    )


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of every tensor."""
    data = read_json(index).get("weight_map")
    if not isinstance(data, dict) or not all(isinstance(v, str) for v in data.values()):
        raise UserError(f"{index} has no weight_map, and is no index; fetch it again.")
    for name in data.values():
        if name != Path(name).name or Path(name).suffix not in SUFFIXES:
            raise UserError(f"{index} names '{name}', which is no file beside it; fetch it again.")
    return data


def _read_shards(index: Path) -> Group:
    """The shards that an index names, and their tensors just as it says."""
    weight_map = _weight_map(index)
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise UserError(f"{index.parent} lacks the shard '{name}'; fetch the rest of it.")
        found = read_group(shard).tensors
        for tensor in sorted(t for t, file in weight_map.items() if file == name):
            if tensor not in found:
                raise UserError(f"{shard} lacks the tensor '{tensor}'; fetch it again.")
        tensors |= found
    return Group(index.parent, tensors, {})


def read_json(path: Path) -> dict:
    """A JSON object, or a refusal that names the file."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> dict:
    """The JSON object that a text is, or a refusal that names where it stands."""
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not the JSON it should be ({error}); fetch it again."
        ) from error
    return data
