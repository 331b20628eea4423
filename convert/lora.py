"""Adapter files in and out: a run, ours, and the families of others, told apart by content."""

from pathlib import Path

from convert.loaders import described as takers_of
from convert.lora_read import read_foreign
from convert.lora_write import DTYPES, LAYOUTS, write_lora
from wanjax.checkpoint import is_native_adapter, load_lora, save_lora
from wanjax.errors import UserError, nearest
from wanjax.lora import LoRA, check_fits, only_for
from wanjax.models.dit import DiTConfig
from wanjax.tensor_files import read_safetensors
from wanjax.weights import abstract_network, read_config

FORMATS = (*LAYOUTS, "native")


def convert_lora(
    src: Path,
    out: Path,
    format: str = "comfyui",
    dtype: str = "float32",
    *,
    skip_unmatched: bool = False,
    model: Path | None = None,
) -> str:
    """Read a run or an adapter file, write one of another kind, and say what was done.

    With `model`, a native folder, an adapter that does not fit it is refused; what it has not is
    left out with `skip_unmatched`.
    `dtype` is that of a foreign file; fp32 gives the very same output as the adapter it came from.
    """
    lora = open_lora(src, skip_unmatched=skip_unmatched)
    left_out: list[str] = []
    if model is not None:
        dit = abstract_network("dit", _config_of(model), "float32")
        if skip_unmatched:
            lora, left_out = only_for(dit, lora)
        check_fits(dit, [(lora, 1.0)])
    write(out, lora, format, dtype)
    report = f"{out}: {describe(lora)}"
    report += f"\nleft out: {', '.join(left_out)}" if left_out else ""
    return report if format == "native" else f"{report}\n{takers_of(read_safetensors(out).tensors)}"


def _config_of(model: Path) -> DiTConfig:
    configs = read_config(model)
    if "dit" not in configs:
        raise UserError(f"{model} holds no dit; convert the checkpoint again, with it.")
    return configs["dit"]


def write(out: Path, lora: LoRA, format: str, dtype: str) -> None:
    """Write an adapter as any of `FORMATS`."""
    if format not in FORMATS:
        raise UserError(f"There is no LoRA format '{format}'{nearest(format, FORMATS)}")
    if format == "native":
        save_lora(out, lora)
    else:
        write_lora(out, lora, format, DTYPES[dtype])


def open_lora(path: Path, *, skip_unmatched: bool = False) -> LoRA:
    """Adapters from a run, a native adapter file or a file of others (`convert.lora_read`).

    `skip_unmatched` leaves out what is of no layer of Wan2.1, which is refused otherwise.
    """
    path = Path(path)
    if path.is_dir() or not path.exists() or is_native_adapter(read_safetensors(path).metadata):
        return load_lora(path)
    return read_foreign(path, skip_unmatched=skip_unmatched)


def describe(lora: LoRA) -> str:
    """One line of what an adapter holds."""
    ranks = sorted({a.rank for a in lora.layers.values()})
    blocks = len({block for a in lora.layers.values() for block in a.numbers})
    size = sum(a.down.size + a.up.size for a in lora.layers.values())
    size += sum(change.values.size for change in lora.changes.values())
    changes = f", {len(lora.changes)} changes of whole parameters" if lora.changes else ""
    return (
        f"{len(lora.layers)} layers in {blocks} blocks, rank {', '.join(map(str, ranks))}{changes}"
        f", {size:,} parameters ({', '.join([*lora.layers, *lora.changes])})"
    )
