"""The native checkpoint folder: `config.json`, `<network>.safetensors`, and `tokenizer/`.

Tensors have our names and our layout, and each is contiguous, stacked layers included. So a process
reads only the byte ranges of the shards that it will hold, a leaf at a time, and what was larger
than its memory never passes through it. `python -m convert pipeline` makes such folders.
"""

import dataclasses
import functools
import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from wanjax.errors import UserError
from wanjax.models import NETWORKS, Config
from wanjax.models.check import check_config, check_runs
from wanjax.outputs import whole_folder
from wanjax.placement import place, place_quantised, sharding_of
from wanjax.precision import F32, is_coarser
from wanjax.progress import progress_bar
from wanjax.quantisation import (
    UNQUANTISED,
    Base,
    QuantisedVariable,
    kernel_shape,
    quantise,
)
from wanjax.tensor_files import (
    SafetensorsWriter,
    drop_pages,
    read_safetensors,
    refuse_pointer,
)
from wanjax.text_files import read_text
from wanjax.types import PathLike

FORMAT, VERSION = "wanjax", 1
METADATA = {"format": FORMAT, "version": str(VERSION)}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class Manifest:
    """What `config.json` says: each network's architecture, and whence it was converted."""

    networks: Mapping[str, Config]
    source: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


def read_config(folder: PathLike) -> dict[str, Config]:
    """The configs of the networks in a native folder, whose files are whole, to run them.

    Raises `UserError` for a folder that is missing, not ours, of a newer version, or truncated.
    """
    networks = dict(read_manifest(folder).networks)
    for name, config in networks.items():
        check_runs(config, f"The {name} in {folder}")
    return networks


def read_manifest(folder: PathLike) -> Manifest:
    """As `read_config`, with the facts about the source that an export needs."""
    folder = Path(folder)
    path = folder / "config.json"
    data = _read_json(folder, path)
    if data.get("version") != VERSION:
        raise UserError(
            f"{path} has version {data.get('version')} and this wanjax reads version {VERSION}; "
            "update wanjax, or convert the checkpoint again."
        )
    networks = {}
    for name, values in _mapping(data, "networks", path).items():
        if name not in NETWORKS:
            raise UserError(f"{path} names an unknown network '{name}'; update wanjax.")
        networks[name] = parse_config(NETWORKS[name][1], values, where=f"{path}, '{name}'")
        read_safetensors(folder / f"{name}.safetensors")
    source = _mapping(data, "source", path)
    return Manifest(networks, {name: _mapping(source, name, path) for name in source})


def _mapping(data: Mapping, name: str, path: Path) -> Mapping:
    """An object within an object of JSON; empty where it is not there."""
    found = data.get(name, {})
    if not isinstance(found, Mapping):
        raise UserError(f"'{name}' in {path} is no JSON object; convert the checkpoint again.")
    return found


def _read_json(folder: Path, path: Path) -> dict:
    if not folder.is_dir():
        raise UserError(
            f"There is no checkpoint folder '{folder}'; make one with `python -m convert pipeline`."
        )
    try:
        data = json.loads(read_text(path)) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); convert the checkpoint again."
        ) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(
            f"{folder} is not a native wanjax checkpoint; "
            f"convert it first with `python -m convert pipeline {folder} NEW_FOLDER`."
        )
    return data


def parse_config(kind: type, values: Mapping[str, object], where: str) -> Config:
    """A config from JSON values, all of whose fields must be there and no others."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where} is no JSON object; convert the checkpoint again.")
    names = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - names):
        raise UserError(f"{where} has an unknown field '{unknown[0]}'; update wanjax.")
    if missing := sorted(names - set(values)):
        raise UserError(f"{where} lacks the field '{missing[0]}'; convert the checkpoint again.")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return check_config(kind(**fields), where)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `config.json`."""
    data = {
        "format": FORMAT,
        "version": VERSION,
        "networks": {k: dataclasses.asdict(v) for k, v in manifest.networks.items()},
        "source": manifest.source,
    }
    (folder / "config.json").write_text(json.dumps(data, indent=1) + "\n")


def abstract_network(
    network: str, config: Config, dtype: DTypeLike, base: Base = UNQUANTISED
) -> nnx.Module:
    """The network with shapes and types in place of arrays, its kernels quantised as `base` says.

    Raises `UserError` for a network that has none of the layers which are quantised.
    """

    def build() -> nnx.Module:
        model = NETWORKS[network][0](config, dtype=dtype, rngs=nnx.Rngs(0))
        quantise(model, base)
        return model

    return nnx.eval_shape(build)


def device_bytes(
    network: str,
    config: Config,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    base: Base = UNQUANTISED,
) -> int:
    """What a network's weights take on one device."""
    leaves = parameters(abstract_network(network, config, dtype, base)).values()
    shards = [sharding_of(x, mesh).shard_shape(x.shape) for x in leaves]
    return sum(math.prod(shard) * x.dtype.itemsize for shard, x in zip(shards, leaves))


def random_network(network: str, config: Config, *, dtype: DTypeLike, seed: int = 0) -> nnx.Module:
    """The network with random weights of a usable scale: kernels normal with variance 1/fan-in,
    scales one, biases zero. Drawn on the host, so that nothing is compiled."""
    graph, state = nnx.split(abstract_network(network, config, dtype))
    generator = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(state):
        if path[-1] in ("scale", "bias"):
            value = np.full(variable.shape, float(path[-1] == "scale"), np.float32)
        else:
            # Of a stacked kernel the last axes are one layer's; a convolution's fan-in is them all.
            layer = variable.shape[1:] if path[0] == "blocks" else variable.shape
            deviation = math.prod(layer[:-1]) ** -0.5
            value = generator.standard_normal(variable.shape, np.float32) * np.float32(deviation)
        variable.set_value(jnp.asarray(value, variable.dtype))
    return nnx.merge(graph, state)


def parameters(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Every variable of a module by its native name, such as `blocks.self_attn.q.kernel`."""
    return {".".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(module))}


def load_network(
    folder: PathLike,
    network: str,
    *,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    base: Base = UNQUANTISED,
) -> nnx.Module:
    """One network of a native folder, on the default device, or sharded over `mesh`.

    Leaves get the types that `wanjax.precision` says for the asked `dtype`, or are quantised as
    `base` says, a layer at a time. Of each only the byte ranges of the local shards are read. Warns
    of a file that has lost what should be fp32. Raises `UserError`, naming the file and the tensor,
    for a folder that does not hold the network whole.
    """
    configs = read_config(folder)
    if network not in configs:
        raise UserError(
            f"{folder} holds no {network} (it has {', '.join(configs) or 'no network'}); "
            "convert the checkpoint again, with it."
        )
    path = Path(folder) / f"{network}.safetensors"
    tensors = read_safetensors(path).tensors
    graph, state = nnx.split(abstract_network(network, configs[network], dtype, base))
    variables = _by_tensor(state)
    _check(path, tensors, {name: _tensor_shape(of) for name, of in variables.items()})
    _warn_of_lost(path, network, configs[network], {k: t.dtype for k, t in tensors.items()})
    total = sum(t.nbytes for t in tensors.values())
    with progress_bar(f"Loading {network}", total, unit="bytes", hidden=total < 1 << 30) as bar:
        for name, of_tensor in variables.items():
            view = tensors[name]
            (place_quantised if len(of_tensor) > 1 else place)(view, *of_tensor, mesh)
            drop_pages(view)
            bar.advance(view.nbytes)
    return nnx.merge(graph, state)


def _by_tensor(state: nnx.State) -> dict[str, list[nnx.Variable]]:
    """The variables that each tensor of a file becomes: one, or a quantised kernel's two."""
    found: dict[str, list[nnx.Variable]] = {}
    for keys, variable in nnx.to_flat_state(state):
        keys = keys[:-1] if isinstance(variable, QuantisedVariable) else keys
        found.setdefault(".".join(map(str, keys)), []).append(variable)
    return found


def _tensor_shape(variables: list[nnx.Variable]) -> tuple[int, ...]:
    return variables[0].shape if len(variables) == 1 else kernel_shape(variables[0])


def _check(path: Path, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple]) -> None:
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            found = f"as {tensors[name].shape}, not {shape}" if name in tensors else "not at all"
            raise UserError(f"{path} holds '{name}' {found}; convert the checkpoint again.")
    if stray := sorted(set(tensors) - set(shapes)):
        raise UserError(f"{path} holds an unknown tensor '{stray[0]}'; convert it again.")


# umT5 was published in bf16 as a whole, and CLIP officially runs in fp16: they lose nothing by it.
_EXACT = ("dit", "vae")


@functools.cache  # tracing a network takes a second
def kept_whole(network: str, config: Config) -> tuple[str, ...]:
    """The leaves that stay fp32 where bfloat16 is asked for."""
    leaves = parameters(abstract_network(network, config, "bfloat16"))
    return tuple(name for name, leaf in leaves.items() if leaf.dtype == F32)


def lost(network: str, config: Config, types: Mapping[str, np.dtype]) -> list[str]:
    """The leaves that should be fp32 and, being stored in these types, no longer are."""
    if network not in _EXACT:
        return []
    return [name for name in kept_whole(network, config) if is_coarser(types[name], F32)]


def _warn_of_lost(path: Path, network: str, config: Config, types: Mapping[str, np.dtype]) -> None:
    if names := lost(network, config, types):
        kinds = " and ".join(sorted({types[name].name for name in names}))
        some = f"all its {len(names)}" if len(names) == len(types) else f"{len(names)} of its"
        warnings.warn(
            f"{path} has {some} tensors in {kinds} that are computed in float32 (such as "
            f"'{names[-1]}'), and so has lost the rest of their digits; convert the checkpoint "
            "again, where --dtype bfloat16 now keeps them.",
            stacklevel=3,
        )


def save_native(
    folder: PathLike, networks: Mapping[str, nnx.Module], tokenizer: PathLike | None = None
) -> None:
    """Write modules in memory as a native folder; parameters keep their types.

    `tokenizer` is a folder to copy one from. Raises `UserError` where `folder` exists or cannot be
    written.
    """
    with whole_folder(Path(folder)) as partial:
        for name, module in networks.items():
            _write_network(partial, name, module)
        write_manifest(partial, Manifest({k: m.config for k, m in networks.items()}))
        if tokenizer is not None:
            copy_tokenizer(Path(tokenizer), partial / "tokenizer", within=Path(tokenizer))


def _write_network(folder: Path, name: str, module: nnx.Module) -> None:
    leaves = parameters(module)
    expected = parameters(abstract_network(name, module.config, jnp.float32))
    if any(isinstance(leaf, QuantisedVariable) for leaf in leaves.values()):
        raise UserError(
            f"The {name} is quantised, and codes are no checkpoint; save it as it was loaded with "
            f"base={UNQUANTISED}."
        )
    if leaves.keys() != expected.keys():
        odd = sorted(leaves.keys() ^ expected.keys())[0]
        raise UserError(
            f"The {name} has '{odd}' beside its own parameters or lacks it; "
            "merge or detach adapters before saving the whole network."
        )
    header = {k: (np.dtype(v.dtype), v.shape) for k, v in leaves.items()}
    with SafetensorsWriter(folder / f"{name}.safetensors", header, METADATA) as writer:
        for leaf, variable in leaves.items():
            writer.write(leaf, np.asarray(variable[...]))


def copy_tokenizer(source: Path, to: Path, *, within: Path) -> None:
    """Copy a tokenizer's files, those that are known and no others, into the new folder `to`.

    Raises `UserError` for a git-lfs pointer, and for a link out of the checkpoint `within`: what it
    leads to is not the checkpoint's to give away.
    """
    root = within.resolve()
    # In Hugging Face's cache a checkpoint is a folder of links to blobs beside it.
    blobs = [root.parents[1] / "blobs"] if root.parent.name == "snapshots" else []
    to.mkdir(parents=True)
    for file in (source / name for name in TOKENIZER_FILES):
        if file.is_file():
            real = file.resolve()
            if not any(real.is_relative_to(place) for place in (root, *blobs)):
                raise UserError(f"{file} is a link out of {within}; put the file itself there.")
            with real.open("rb") as opened:
                refuse_pointer(file, opened.read(8))
            shutil.copyfile(real, to / file.name)


def fingerprint(folder: PathLike, network: str) -> str:
    """A short hash of a network's config, its tensors' names and shapes, and samples of each.

    It tells one checkpoint from another without reading the whole of it: the first and the last
    4 KiB of every leaf are hashed, and of every layer of a stacked one.
    """
    configs = read_config(folder)
    if network not in configs:
        raise UserError(f"{folder} holds no {network}; convert the checkpoint again, with it.")
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(configs[network])).encode())
    tensors = read_safetensors(Path(folder) / f"{network}.safetensors").tensors
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].shape} {tensors[name].dtype}".encode())
        for layer in tensors[name] if name.startswith("blocks.") else [tensors[name]]:
            flat = layer.reshape(-1).view(np.uint8)
            digest.update(flat[:4096].tobytes() + flat[-4096:].tobytes())
    return digest.hexdigest()[:16]


def replace_network(source: PathLike, folder: PathLike, network: str, module: nnx.Module) -> None:
    """A native folder like `source` in which one network is `module`; the others are hard links
    where the disk allows it, else copies."""
    source, manifest = Path(source), read_manifest(source)
    with whole_folder(Path(folder)) as partial:
        _write_network(partial, network, module)
        for name in manifest.networks:
            if name != network:
                link_or_copy(source / f"{name}.safetensors", partial / f"{name}.safetensors")
        if (source / "tokenizer").is_dir():
            copy_tokenizer(source / "tokenizer", partial / "tokenizer", within=source)
        write_manifest(partial, manifest)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy where links cannot be made."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
