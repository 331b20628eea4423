"""A quantised base as it is loaded: on a mesh, and in how much memory.

Each in a process of its own: the devices must be there before JAX starts, and anonymous memory is
sampled from outside. The weights of the second are a sparse file, which takes no disk.
"""

import math
import os
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.processes import on_eight_devices, peak_memory
from wanjax.models.dit import DiTConfig
from wanjax.tensor_files import SafetensorsWriter
from wanjax.weights import (
    METADATA,
    Manifest,
    abstract_network,
    device_bytes,
    parameters,
    random_network,
    save_native,
    write_manifest,
)

pytestmark = pytest.mark.compiles

MB = 1_000_000
TOLERANCE = 1e-5
# Of a width whose blocks of 64 divide over eight devices.
SPLIT = DiTConfig(dim=512, ffn_dim=256, num_layers=2, num_heads=8, text_dim=24, image_dim=20)
LARGE = DiTConfig(dim=512, ffn_dim=8192, num_layers=24, num_heads=8, text_dim=64, text_len=8)

ON_A_MESH = """
import json, sys
import jax, numpy as np
from tests.toy import toy_batch
from wanjax.sharding import make_mesh
from wanjax.training import TrainConfig, Trainer
from wanjax.weights import device_bytes, load_network, parameters

base = sys.argv[2]
settings = TrainConfig(base=base, targets="all", rank=2, dtype="float32", batch=2, warmup=0)
found = {}
for name, sizes in (("one", None), ("mesh", {"data": 2, "ulysses": 4})):
    mesh = None if sizes is None else make_mesh(**sizes)
    dit = load_network(sys.argv[1], "dit", dtype="float32", mesh=mesh, base=base)
    leaves = parameters(dit)
    held = sum(v[...].addressable_shards[0].data.nbytes for v in leaves.values())
    assert held == device_bytes("dit", dit.config, "float32", mesh, base), name
    trainer = Trainer(dit, settings, mesh)
    found[name] = leaves, jax.device_get(trainer.train(toy_batch()))
(one, metrics), (split, others) = found.values()
for name, variable in one.items():
    np.testing.assert_array_equal(split[name][...], variable[...], err_msg=name)
codes = split["blocks.ffn.up.kernel.codes"][...]
print(json.dumps({
    "share": codes.addressable_shards[0].data.size / codes.size,
    "distance": [abs(others[k] / metrics[k] - 1).item() for k in metrics],
}))
"""


def test_a_sharded_base_equals_the_whole_one(tmp_path):
    """Of nf4, whose codes are packed as well."""
    save_native(tmp_path / "ck", {"dit": random_network("dit", SPLIT, dtype=jnp.float32)})
    found = on_eight_devices(ON_A_MESH, tmp_path / "ck", "nf4")
    assert found["share"] == 1 / 8
    assert len(found["distance"]) == 2 and max(found["distance"]) <= TOLERANCE


def sparse_native(folder: Path, config: DiTConfig) -> None:
    """A native folder of zeros."""
    folder.mkdir()
    leaves = parameters(abstract_network("dit", config, "float32"))
    tensors = {name: (np.dtype(np.float32), leaf.shape) for name, leaf in leaves.items()}
    path = folder / "dit.safetensors"
    with (
        pytest.raises(ValueError, match="never written"),
        SafetensorsWriter(path, tensors, METADATA),
    ):
        pass
    os.truncate(path, path.stat().st_size + 4 * sum(math.prod(s) for _, s in tensors.values()))
    write_manifest(folder, Manifest({"dit": config}))


LOAD = """
import sys
from wanjax.weights import load_network
load_network(sys.argv[1], "dit", dtype="bfloat16", base=sys.argv[2])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts RssAnon")
@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_each_further_layer_takes_its_codes_alone(base, tmp_path):
    """On a CPU, where host and device are one memory: beside the model there is one layer."""
    peaks, models = [], []
    for count in (2, LARGE.num_layers):
        config = replace(LARGE, num_layers=count)
        sparse_native(tmp_path / f"{count}", config)
        peaks.append(peak_memory("-c", LOAD, tmp_path / f"{count}", base))
        models.append(device_bytes("dit", config, "bfloat16", base=base))
    growth, expected = peaks[1] - peaks[0], models[1] - models[0]
    stacked = 4 * LARGE.dim * LARGE.ffn_dim * LARGE.num_layers
    print(
        f"{growth / MB:.0f} MB, codes and scales {expected / MB:.0f}, a kernel {stacked / MB:.0f}"
    )
    # What the allocator keeps changes from run to run by a fifth of the codes; a stacked kernel in
    # bf16 would be a half of `stacked`.
    assert growth < expected + stacked / 4, "more than codes and a layer"
