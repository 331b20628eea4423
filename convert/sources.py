"""Where the networks of a checkpoint are: an official folder, a diffusers folder, single files.

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

from convert.configs import dit_from_official, from_diffusers, to_diffusers
from convert.infer import Shapes, infer, infer_dit
from convert.networks import Named, name_tensors, recognise
from convert.relatives import refuse_relatives
from convert.torch_files import read_torch
from wanjax.errors import UserError, some
from wanjax.models import NETWORKS, Config
from wanjax.models.check import check_config
from wanjax.tensor_files import read_safetensors
from wanjax.text_files import read_text
from wanjax.weights import parse_config

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", ".sft", *TORCH_SUFFIXES)
# Names the shards of a network: `model.safetensors.index.json`, of a variant `...index.fp16.json`.
_INDEX = re.compile(r"^(?P<stem>.+)\.(?P<kind>safetensors|bin)\.index(?P<variant>\.\w+)?\.json$")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
# The same weights in another precision, or averaged over the training.
_VARIANT = re.compile(r"\.(fp\d+\w*|bf16|(non_)?ema)$")
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
    return _parsed(read_text(path), str(path))


def _parsed(text: str, where: str) -> dict:
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not the JSON it should be ({error}); fetch it again."
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
    if listed.get("transformer_2") not in (None, [None, None]):
        raise UserError(f"{path} is Wan2.2 (it has a transformer_2); use a Wan2.1 checkpoint.")
    return {
        network: open_source(_read_component(path / component, network), expected=network)
        for component, network in COMPONENTS.items()
        if (not only or network in only) and (path / component).is_dir()
    }


def _read_component(folder: Path, network: str) -> Group:
    """The weights in one part of a diffusers folder, whatever they turn out to be."""
    found = read_networks(folder)
    if not found:
        raise UserError(f"{folder} has no weights of the {network}; fetch the folder again.")
    return found.get(network) or next(iter(found.values()))


def _file_sources(path: Path, only: Collection[str]) -> dict[str, Source]:
    for name in ("high_noise_model", "low_noise_model"):
        if (path / name).is_dir():
            raise UserError(f"{path} is Wan2.2 (it has a {name}); use a Wan2.1 checkpoint.")
    return {network: open_source(group) for network, group in read_networks(path, only).items()}


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
    if network == "dit":
        refuse_relatives(named.tensors, infer_dit(shapes, heads=1), group.path)
    beside = group.path if group.path.is_dir() else group.path.parent
    data = _config_beside(beside, network, expected)
    if not data:
        theirs = None
    elif data.get("_class_name") == "WanModel":
        theirs = dit_from_official(data, shapes)
    else:
        theirs = from_diffusers(network, data, f"{beside}/config.json")
    ours = _own_configs(beside, group.metadata, where).get(network)
    if ours is None:
        theirs = check_config(theirs or infer(network, shapes, layout), where)
        return Source(group.path, named, theirs)
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


def _own_configs(folder: Path, metadata: Mapping[str, str], where: str) -> dict:
    """What our own exports say beside the file, in the folder above (diffusers), or inside it."""
    if CONFIGS_KEY in metadata:
        return _parsed(metadata[CONFIGS_KEY], f"The config inside {where}")
    path = (folder.parent if folder.name in COMPONENTS else folder) / CONFIGS_FILE
    networks = read_json(path).get("networks", {}) if path.is_file() else {}
    if not isinstance(networks, dict):
        raise UserError(f"'networks' in {path} is no JSON object; delete the file, or fetch it.")
    return networks


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
        if name != Path(name).name or name in ("", ".."):
            raise UserError(f"{index} names '{name}', which is not beside it; fetch it again.")
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
