"""The networks of a checkpoint, each with its config: an official or diffusers folder, or files."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from convert.configs import dit_from_official, from_diffusers, to_diffusers
from convert.groups import Group, parse_json, read_json, read_networks
from convert.infer import Shapes, infer, infer_dit
from convert.networks import Named, name_tensors, recognise
from convert.relatives import refuse_relatives
from wanjax.errors import UserError
from wanjax.models import NETWORKS, Config
from wanjax.models.check import check_config
from wanjax.weights import parse_config

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
        return parse_json(metadata[CONFIGS_KEY], f"The config inside {where}")
    path = (folder.parent if folder.name in COMPONENTS else folder) / CONFIGS_FILE
    networks = read_json(path).get("networks", {}) if path.is_file() else {}
    if not isinstance(networks, dict):
        raise UserError(f"'networks' in {path} is no JSON object; delete the file, or fetch it.")
    return networks


def find_tokenizer(path: Path, kind: str) -> Path | None:
    """The folder of umT5's tokenizer in a checkpoint."""
    places = {"official": "google/umt5-xxl", "diffusers": "tokenizer"}
    folder = path / places.get(kind, "tokenizer")
    return folder if folder.is_dir() else None
