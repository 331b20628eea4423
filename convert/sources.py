"""Where the networks of a checkpoint are: an official folder, a diffusers folder, single files.

Files are told apart by the names of their tensors, so loose files may be called anything. Nothing
is copied here: tensors are views of mapped files.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.configs import dit_from_official, from_diffusers, to_diffusers
from convert.infer import Shapes, infer
from convert.networks import Named, name_tensors, recognise
from convert.torch_files import read_torch
from wanjax.errors import UserError
from wanjax.models import NETWORKS, Config
from wanjax.tensor_files import read_safetensors
from wanjax.weights import parse_config

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", ".sft", *TORCH_SUFFIXES)
_INDEX = ".safetensors.index.json"
# The parts of a diffusers folder, and our names for them.
COMPONENTS = {
    "transformer": "dit",
    "vae": "vae",
    "text_encoder": "text_encoder",
    "image_encoder": "image_encoder",
}
# What official folders call the files that are not safetensors.
OFFICIAL_NAMES = {
    "vae": "Wan2.1_VAE.pth",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
}
_OFFICIAL_HINTS = {"vae": "vae", "models_t5": "text_encoder", "models_clip": "image_encoder"}
# The network that a `config.json` describes, by its `_class_name` or `model_type`.
_CLASSES = {
    "WanModel": "dit",
    "WanTransformer3DModel": "dit",
    "AutoencoderKLWan": "vae",
    "umt5": "text_encoder",
    "clip_vision_model": "image_encoder",
}
# Beside the checkpoint, our own exports keep the configs that their formats have no place for.
CONFIGS_FILE = "wanjax.json"
CONFIGS_KEY = "wanjax.config"
SPIECE = "spiece_model"


@dataclass(frozen=True)
class Source:
    """A network as it was found."""

    path: Path
    named: Named
    config: Config

    @property
    def network(self) -> str:
        return self.named.network


@dataclass(frozen=True)
class Checkpoint:
    """All that was found: kind (`official`, `diffusers`, `files`), networks, tokenizer's folder."""

    kind: str
    sources: Mapping[str, Source]
    tokenizer: Path | None


@dataclass(frozen=True)
class Group:
    """The files of one network: tensors by name, and the metadata of a safetensors file."""

    path: Path
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]


def open_checkpoint(path: Path, only: Collection[str] = ()) -> Checkpoint:
    """Find the networks of a checkpoint, or just those in `only`.

    Raises `UserError` where something is missing, truncated, ambiguous, or not a Wan2.1 model.
    """
    if not path.exists():
        raise UserError(f"There is no file or folder '{path}'; check its name.")
    kind = kind_of(path)
    if kind == "native":
        raise UserError(f"{path} is a native wanjax checkpoint already; nothing needs converting.")
    found = _diffusers_sources(path, only) if kind == "diffusers" else _file_sources(path, only)
    _require_all(path, kind, found, only, whole=kind != "files" and not only)
    ordered = {name: found[name] for name in NETWORKS if name in found}
    return Checkpoint(kind, ordered, find_tokenizer(path, kind))


def kind_of(path: Path) -> str:
    """`native`, `diffusers`, `official`, or `files` (a single file, or a folder of such)."""
    if not path.is_dir():
        return "files"
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if config.get("format") == "wanjax":
        return "native"
    if (path / "model_index.json").is_file() or (path / "transformer/config.json").is_file():
        return "diffusers"
    is_official = config.get("_class_name") == "WanModel" or any(path.glob("models_t5*.pth"))
    return "official" if is_official else "files"


def read_json(path: Path) -> dict:
    """A JSON object, or a refusal that names the file."""
    try:
        data = json.loads(path.read_text())
        if not isinstance(data, dict):
            raise ValueError("not an object")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); fetch it again.") from error
    except ValueError as error:
        raise UserError(
            f"{path} is not the JSON it should be ({error}); fetch it again."
        ) from error
    return data


def _require_all(path: Path, kind: str, found: Mapping, only: Collection[str], whole: bool) -> None:
    wanted = set(only)
    if whole:
        wanted = {"dit", "vae", "text_encoder"}
        if "dit" in found and found["dit"].config.image_dim is not None:
            wanted.add("image_encoder")
    missing = [name for name in NETWORKS if name in wanted - found.keys()]
    if missing:
        place = (
            dict(zip(COMPONENTS.values(), COMPONENTS)) if kind == "diffusers" else OFFICIAL_NAMES
        )
        file = f" ({place[missing[0]]})" if kind != "files" and missing[0] in place else ""
        rest = ",".join(found) or "dit"
        remedy = f"fetch it, or convert what there is with --only {rest}" if whole else "fetch it"
        raise UserError(f"{path} has no {missing[0]}{file}; {remedy}.")
    if not found:
        raise UserError(
            f"{path} holds no network of Wan2.1; give an official or diffusers folder, or a "
            "safetensors file of one network."
        )


def _diffusers_sources(path: Path, only: Collection[str]) -> dict[str, Source]:
    index = path / "model_index.json"
    listed = read_json(index) if index.is_file() else {}
    if listed.get("transformer_2", [None])[0] is not None:
        raise UserError(f"{path} is Wan2.2 (it has a transformer_2); use a Wan2.1 checkpoint.")
    return {
        network: open_source(read_group(path / component), expected=network)
        for component, network in COMPONENTS.items()
        if (not only or network in only) and (path / component).is_dir()
    }


def _file_sources(path: Path, only: Collection[str]) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for group in read_groups(path, only):
        known = recognise(group.tensors)
        if known is None and not path.is_dir():
            raise UserError(
                f"{path} is not a network of Wan2.1 (its first tensor is "
                f"'{next(iter(group.tensors), None)}'); see `python -m convert inspect {path}`."
            )
        if known is None or (only and known[0] not in only):
            continue
        if known[0] in found:
            raise UserError(
                f"{path} holds two files of the {known[0]}, {found[known[0]].path.name} and "
                f"{group.path.name}; leave one, or give a single file."
            )
        found[known[0]] = open_source(group)
    return found


def open_source(group: Group, expected: str | None = None) -> Source:
    """Name the tensors and find the config: ours, if it is there, else theirs, else by shapes.

    `expected` is the network that a diffusers folder must have here, with its config.
    """
    where = str(group.path)
    network, layout = recognise(group.tensors) or (expected or "dit", "diffusers")
    if expected not in (None, network):
        raise UserError(f"{where} holds a {network} where the {expected} belongs; fetch it again.")
    named = name_tensors(network, layout, group.tensors, where)
    shapes = Shapes(network, layout, named.tensors, where)
    beside = group.path if group.path.is_dir() else group.path.parent
    data = _config_beside(beside, network, expected)
    if not data:
        theirs = None
    elif data.get("_class_name") == "WanModel":
        theirs = dit_from_official(data, shapes)
    else:
        theirs = from_diffusers(network, data, f"{beside}/config.json")
    ours = _own_configs(beside, group.metadata).get(network)
    if ours is None:
        return Source(group.path, named, theirs or infer(network, shapes, layout))
    config = parse_config(NETWORKS[network][1], ours, where=f"{where}'s wanjax config")
    if theirs is not None:
        _refuse_edited(beside / "config.json", to_diffusers(network, theirs), network, config)
    return Source(group.path, named, config)


def _refuse_edited(path: Path, found: Mapping, network: str, config: Config) -> None:
    """Our own note beside an export must agree with its `config.json`, as far as that goes."""
    written = to_diffusers(network, config)
    for name, value in written.items():
        if found[name] != value:
            raise UserError(
                f"{path} and {CONFIGS_FILE} do not agree about {name} ({found[name]} and {value}): "
                f"one was edited after the export; correct it, or delete {CONFIGS_FILE}."
            )


def _config_beside(folder: Path, network: str, expected: str | None) -> dict:
    """The `config.json` of this network; empty where there is none, or it is of another one."""
    path = folder / "config.json"
    if not path.is_file():
        if expected is not None:
            raise UserError(f"{folder} lacks its config.json; fetch it.")
        return {}
    data = read_json(path)
    kind = str(data.get("_class_name") or data.get("model_type"))
    known = _CLASSES.get(kind)
    # A model of another class (VACE, for one) is not to be taken for the one that it extends.
    if known != network and (expected or (known is None and network == "dit")):
        raise UserError(
            f"{path} is of a {kind}, which is not the {network} of a Wan2.1 pipeline; use a Wan2.1 "
            "text-to-video, image-to-video or first-and-last-frame checkpoint."
        )
    return data if known == network else {}


def _own_configs(folder: Path, metadata: Mapping[str, str]) -> dict:
    """What our own exports say beside the file, in the folder above (diffusers), or inside it."""
    if CONFIGS_KEY in metadata:
        return json.loads(metadata[CONFIGS_KEY])
    path = (folder.parent if folder.name in COMPONENTS else folder) / CONFIGS_FILE
    return read_json(path).get("networks", {}) if path.is_file() else {}


def read_groups(path: Path, only: Collection[str] = ()) -> list[Group]:
    """The files of a folder by network, or the one file that `path` is."""
    return [read_group(place) for place in find_groups(path, only)]


def find_groups(path: Path, only: Collection[str] = ()) -> list[Path]:
    """What in a folder makes a network each: indices, for the shards they name, and lone files.

    Official files whose names say that they are not in `only` are left out. Folders inside are
    looked through as well, to the depth that ComfyUI's have.
    """
    if not path.is_dir():
        return [path]
    files = [f for pattern in ("*", "*/*", "*/*/*") for f in sorted(path.glob(pattern))]
    indices = [f for f in files if f.name.endswith(_INDEX)]
    taken = {i.parent / name for i in indices for name in _weight_map(i).values()}
    found = list(indices)
    for file in files:
        hint = next((n for k, n in _OFFICIAL_HINTS.items() if k in file.name.lower()), None)
        unwanted = only and hint is not None and hint not in only
        if file.suffix in SUFFIXES and file.is_file() and file not in taken and not unwanted:
            found.append(file)
    return found


def read_group(path: Path) -> Group:
    """The tensors of a file, of the shards of an index, or of a folder that holds one network."""
    if path.name.endswith(_INDEX):
        return _read_shards(path)
    if path.is_dir():
        indices = sorted(path.glob(f"*{_INDEX}"))
        files = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES)
        if len(indices) == 1:
            return _read_shards(indices[0])
        if len(files) != 1:
            what = "no weights" if not files else f"{len(files)} files of weights and no one index"
            raise UserError(f"{path} has {what}; fetch the folder again, with one set of weights.")
        path = files[0]
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


def find_tokenizer(path: Path, kind: str) -> Path | None:
    """The folder of umT5's tokenizer in a checkpoint."""
    places = {"official": "google/umt5-xxl", "diffusers": "tokenizer"}
    folder = path / places.get(kind, "tokenizer")
    return folder if folder.is_dir() else None
