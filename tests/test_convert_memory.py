"""Conversion's memory does not grow with the checkpoint: anonymous pages, sampled from outside.

The sources are sparse files, so they take no disk; what is written from them is real. The size that
the issue names, 7 GB, takes a minute and 14 GB of disk, and runs only when it is asked for:

    WANJAX_LARGE=1 python -m pytest tests/test_convert_memory.py
"""

import json
import math
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from convert.mapping import leaf_shapes
from convert.networks import TABLES, layers
from convert.stream import Planned
from convert.table import expand
from convert.torch_files import write_torch
from tests.checkpoints import hub_config
from tests.processes import peak_memory
from wanjax.models import Config
from wanjax.models.dit import DiTConfig
from wanjax.models.umt5 import UMT5Config
from wanjax.tensor_files import SafetensorsWriter

pytestmark = pytest.mark.compiles  # it starts processes, of which it watches the memory

MB = 1_000_000
LARGE = "WANJAX_LARGE" in os.environ
DIT = DiTConfig(dim=1536, ffn_dim=8960, num_layers=36 if LARGE else 4, num_heads=12)
UMT5 = UMT5Config(vocab_size=60_000, dim=1024, attention_dim=1024, ffn_dim=2816, num_layers=4)


def shapes(network: str, config: Config) -> dict[str, tuple[int, ...]]:
    """The official tensors of a network."""
    ours = leaf_shapes(network, config)
    found = {}
    for e in expand(TABLES[network].rows(config), "official", layers(config)):
        shape = ours[e.ours] if e.layer is None else ours[e.ours][1:]
        found[e.theirs] = e.op.to_theirs(np.broadcast_to(np.float32(0), shape)).shape
    return found


def sparse_dit(folder: Path) -> int:
    """An official folder of zeros that takes no disk; the size of all tensors."""
    folder.mkdir()
    tensors = {name: (np.dtype("f4"), shape) for name, shape in shapes("dit", DIT).items()}
    size = 4 * sum(math.prod(shape) for _, shape in tensors.values())
    path = folder / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="never written"), SafetensorsWriter(path, tensors):
        pass
    os.truncate(path, path.stat().st_size + size)
    (folder / "config.json").write_text(json.dumps(hub_config(DIT)))
    return size


peak_of_convert = partial(peak_memory, "-m", "convert")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts RssAnon")
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_safetensors_in_and_out(dtype, tmp_path):
    size = sparse_dit(tmp_path / "src")
    largest = 4 * max(math.prod(shape) for shape in shapes("dit", DIT).values())
    limit = peak_of_convert("inspect", tmp_path / "src") + 2 * largest  # as promised
    assert size > 2 * limit, "the test would not tell"
    casting = ("--dtype", dtype) if dtype else ()
    only = ("--only", "dit")
    peaks = [
        peak_memory(
            "-m", "convert", "pipeline", tmp_path / "src", tmp_path / "native", *only, *casting
        )
    ]
    shutil.rmtree(tmp_path / "src")
    if dtype is None:
        arguments = ("export", tmp_path / "native", tmp_path / "out", "--format", "official")
        peaks.append(peak_of_convert(*arguments))
    print(
        f"{size / MB:.0f} MB in memory of {[round(p / MB) for p in peaks]} MB, limit {limit / MB}"
    )
    assert max(peaks) < limit


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts RssAnon")
def test_pth_in_and_out(tmp_path):
    zeros = np.zeros((), np.dtype("bfloat16"))
    tensors = {n: np.broadcast_to(zeros, s) for n, s in shapes("text_encoder", UMT5).items()}
    planned = [Planned(n, t.dtype, t.shape, (t,)) for n, t in tensors.items()]
    (tmp_path / "src").mkdir()
    write_torch(tmp_path / "src/models_t5.pth", planned, lambda _: None)
    arguments = ("export", tmp_path / "native", tmp_path / "out", "--format", "official")
    only = ("--only", "text_encoder")
    peaks = [
        peak_of_convert("pipeline", tmp_path / "src", tmp_path / "native", *only),
        peak_of_convert(*arguments, *only),
    ]
    largest, size = max(t.nbytes for t in planned), sum(t.nbytes for t in planned)
    # The embedding, half of the file, is never held: only the matrices that are transposed are.
    limit = peak_of_convert("inspect", tmp_path / "src/models_t5.pth") + largest / 2
    print(f"{size / MB:.0f} MB in {[round(p / MB) for p in peaks]} MB, limit {limit / MB:.0f} MB")
    assert max(peaks) < limit < size
