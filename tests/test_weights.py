"""The native folder: what is written loads again, whole or sharded, and other folders do not."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from wanjax.errors import UserError
from wanjax.lora import attach
from wanjax.models.dit import DiTConfig
from wanjax.models.vae import VAEConfig
from wanjax.tensor_files import (
    SafetensorsWriter,
    contiguous,
    drop_pages,
    read_safetensors,
)
from wanjax.weights import abstract_network, load_network, parameters, read_config, save_native

DIT = DiTConfig(dim=64, ffn_dim=48, num_layers=3, num_heads=2, text_dim=20, image_dim=24)
CONFIGS = {"dit": DIT, "vae": VAEConfig(base_dim=8)}


def build(network: str, dtype=jnp.float32) -> nnx.Module:
    """A network with random weights, without running its initialisers one by one."""
    graph, state = nnx.split(abstract_network(network, CONFIGS[network], dtype))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(state):
        values = rng.standard_normal(variable.shape, np.float32)
        variable.set_value(jnp.asarray(values, variable.dtype))
    return nnx.merge(graph, state)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights")
    (path / "tokenizer").mkdir()
    (path / "tokenizer/tokenizer.json").write_text("{}")
    networks = {name: build(name) for name in CONFIGS}
    save_native(path / "native", networks, path / "tokenizer")
    return path / "native"


@pytest.mark.parametrize("network", CONFIGS)
def test_what_is_saved_loads_bit_for_bit(network, folder):
    assert read_config(folder) == CONFIGS
    assert (folder / "tokenizer/tokenizer.json").is_file()
    loaded = parameters(load_network(folder, network, dtype=jnp.float32))
    for name, variable in parameters(build(network)).items():
        assert loaded[name].dtype == variable.dtype, name
        assert np.array_equal(loaded[name][...], variable[...]), name


def test_loading_casts_to_the_types_that_the_network_is_built_in(folder):
    """Matrices to bfloat16, and what the network keeps in fp32 stays fp32."""
    loaded = parameters(load_network(folder, "dit", dtype=jnp.bfloat16))
    built = parameters(build("dit", jnp.bfloat16))
    whole = parameters(build("dit"))
    assert {v.dtype.name for v in built.values()} == {"float32", "bfloat16"}
    for name, variable in built.items():
        assert loaded[name].dtype == variable.dtype, name
        want = np.asarray(whole[name][...]).astype(variable.dtype)
        assert np.array_equal(np.asarray(loaded[name][...]), want), name


def test_an_old_folder_in_bf16_is_taken_with_a_warning(folder, tmp_path):
    """As `convert --dtype bfloat16` once wrote it: all in bfloat16."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for network in CONFIGS:
            load_network(folder, network, dtype=jnp.bfloat16)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for network in CONFIGS:
        resave(copy, lambda t: t.update({n: x.astype("bfloat16") for n, x in t.items()}), network)
    for network, words in (("dit", "dit.* has .* of its tensors"), ("vae", "vae.* has all its")):
        with pytest.warns(UserWarning, match=f"{words} .*in bfloat16 .*--dtype bfloat16 now keeps"):
            loaded = load_network(copy, network, dtype=jnp.bfloat16)
        types = {v.dtype.name for v in parameters(loaded).values()}
        assert types == {"float32", "bfloat16"} if network == "dit" else {"float32"}


def test_a_loaded_network_does_not_look_at_the_file_again(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    loaded = load_network(copy, "dit", dtype=jnp.float32)
    size = (copy / "dit.safetensors").stat().st_size
    (copy / "dit.safetensors").write_bytes(b"\0" * size)
    whole = parameters(build("dit"))
    for name, variable in parameters(loaded).items():
        assert np.array_equal(variable[...], whole[name][...]), name


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, sys
from wanjax.sharding import make_mesh
from wanjax.weights import abstract_network, load_network, parameters
import wanjax.weights as weights

class Watched(np.ndarray):
    read = 0
    def __getitem__(self, index):
        part = super().__getitem__(index)
        Watched.read += part.size
        return part.view(np.ndarray)

mesh = make_mesh(data=2, ulysses=2)
whole = parameters(load_network(sys.argv[1], "dit", dtype=jnp.float32))
place = weights.place
def watch(view, variable, mesh):
    Watched.read = 0
    place(view.view(Watched), variable, mesh)
    assert Watched.read == view.size, f"{view.size} elements, {Watched.read} read"
weights.place = watch
split = parameters(load_network(sys.argv[1], "dit", dtype=jnp.float32, mesh=mesh))
q = split["blocks.self_attn.q.kernel"][...]
assert q.shape == (3, 64, 64) and q.addressable_shards[0].data.shape == (3, 16, 64), q.sharding
for name, variable in whole.items():
    assert np.array_equal(split[name][...], variable[...]), name
    assert split[name][...].sharding.device_set == set(mesh.devices.flat), name
"""


def test_each_device_gets_its_shards_and_no_byte_is_read_twice(folder):
    flags = "--xla_force_host_platform_device_count=4"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-c", SHARDED, str(folder)]
    root = Path(__file__).parents[1]
    done = subprocess.run(run, env=env, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_bfloat16_leaves_are_kept(tmp_path):
    save_native(tmp_path / "native", {"dit": build("dit", jnp.bfloat16)})
    with safe_open(tmp_path / "native/dit.safetensors", "flax") as file:
        assert file.get_slice("blocks.ffn.up.kernel").get_dtype() == "BF16"
        assert file.get_slice("blocks.modulation").get_dtype() == "F32"
        assert file.metadata()["format"] == "wanjax"


def test_adapters_are_not_saved_as_if_they_were_the_network(tmp_path):
    model = build("dit")
    attach(model, rank=2, alpha=2, targets="qv", rngs=nnx.Rngs(1))
    with pytest.raises(UserError, match="lora.*merge or detach"):
        save_native(tmp_path / "native", {"dit": model})
    assert list(tmp_path.iterdir()) == []


def spoil_json(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def resave(folder: Path, change, network: str = "dit") -> None:
    path = folder / f"{network}.safetensors"
    tensors = {n: np.array(t) for n, t in read_safetensors(path).tensors.items()}
    change(tensors)
    with SafetensorsWriter(path, {n: (t.dtype, t.shape) for n, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


SPOILED = {
    "no folder": (shutil.rmtree, "no checkpoint folder"),
    "no config": (lambda d: (d / "config.json").unlink(), "not a native wanjax checkpoint"),
    "not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read"),
    "another project's": (lambda d: spoil_json(d, format="x"), "not a native wanjax checkpoint"),
    "a newer version": (lambda d: spoil_json(d, version=2), "version 2 .* update wanjax"),
    "an unknown network": (lambda d: spoil_json(d, networks={"dti": {}}), "'dti'"),
    "an unknown field": (
        lambda d: spoil_json(d, networks={"vae": {"zdim": 3}}),
        "unknown field 'zdim'",
    ),
    "a missing field": (lambda d: spoil_json(d, networks={"vae": {}}), "lacks the field 'base_dim"),
    "no such network": (lambda d: spoil_json(d, networks={}), "holds no dit"),
    "a file missing": (lambda d: (d / "dit.safetensors").unlink(), "dit.safetensors cannot be"),
    "a file cut": (lambda d: os.truncate(d / "dit.safetensors", 90_000), "truncated"),
    "a tensor missing": (
        lambda d: resave(d, lambda t: t.pop("blocks.modulation")),
        "'blocks.modulation' not at all",
    ),
    "a tensor misshapen": (
        lambda d: resave(d, lambda t: t.update({"head.modulation": np.zeros((2, 65), "f4")})),
        r"'head.modulation' as \(2, 65\), not \(2, 64\)",
    ),
    "a tensor too many": (
        lambda d: resave(d, lambda t: t.update({"tail": np.zeros(3, "f4")})),
        "unknown tensor 'tail'",
    ),
}


@pytest.mark.parametrize(("spoil", "match"), SPOILED.values(), ids=SPOILED)
def test_spoiled_folders_are_refused_by_name(spoil, match, folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    spoil(copy)
    with pytest.raises(UserError, match=match):
        load_network(copy, "dit", dtype=jnp.float32)


def test_an_existing_folder_is_not_written_over(folder):
    with pytest.raises(UserError, match="exists already"):
        save_native(folder, {"vae": build("vae")})
    assert read_config(folder) == CONFIGS


def test_a_writer_that_was_not_given_everything_says_so(tmp_path):
    header = {"a": (np.dtype("f4"), (2, 3))}
    with (
        pytest.raises(ValueError, match="12 bytes .* never written"),
        SafetensorsWriter(tmp_path / "x", header) as writer,
    ):
        writer.write("a", np.ones(3), at=3)
    with (
        pytest.raises(ValueError, match="over the end of 'a'"),
        SafetensorsWriter(tmp_path / "x", header) as writer,
    ):
        writer.write("a", np.ones(6), at=1)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 1), (33, 70), (130, 7), (5, 4, 3)])
def test_contiguous_copies_are_exact(shape, kind):
    array = np.random.default_rng(0).standard_normal(shape).astype(kind)
    for dtype in (np.dtype("f4"), np.dtype(ml_dtypes.bfloat16)):
        for view in (array.T, array[::-1], array[:, 1:], array):
            got = contiguous(view, dtype)
            assert got.flags.c_contiguous and got.dtype == dtype
            assert np.array_equal(got, view.astype(dtype))


def test_dropped_pages_come_back(tmp_path):
    data = np.random.default_rng(0).random((500, 1000), np.float32)
    with SafetensorsWriter(tmp_path / "x", {"a": (data.dtype, data.shape)}) as writer:
        writer.write("a", data)
    view = read_safetensors(tmp_path / "x").tensors["a"]
    assert np.array_equal(view, data)
    drop_pages(view[3:].T)
    drop_pages(data)  # nothing is mapped there
    assert np.array_equal(view, data)
