"""The commands about adapters of `python -m convert`. What they need, all of JAX, comes when one
of them runs."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from wanjax.errors import UserError

Command = Callable[[str, str], argparse.ArgumentParser]
_FORMATS = ("comfyui", "diffusers", "kohya", "musubi", "native")
_SRC = "a run, or an adapter of anyone's"
EXAMPLES = """\
  # a trained adapter for ComfyUI and diffusers, and one from elsewhere for us
  python -m convert lora runs/noir noir.safetensors --format comfyui
  python -m convert lora runs/noir noir.safetensors --format diffusers --dtype bfloat16
  python -m convert lora downloaded.safetensors adapter.safetensors --format native
  # ranks, scales, norms, metadata, and who would take it
  python -m convert lora-info downloaded.safetensors
  # adapters added to a model, in any layout
  python -m convert lora-merge checkpoints/i2v_14b NEW runs/noir:0.8 fast.safetensors
  # the difference of two checkpoints, and less of an adapter
  python -m convert lora-extract checkpoints/i2v_14b tuned out.safetensors --rank 64
  python -m convert lora-resize big.safetensors small.safetensors --rank 16
"""


def add(command: Command) -> None:
    """Add the commands to the parser."""
    lora = command("lora", "Convert an adapter: a run or a file of any trainer, to another's form.")
    lora.add_argument("src", type=Path, metavar="SRC", help=_SRC)
    _add_output(lora)
    lora.add_argument(
        "--skip-unmatched",
        action="store_true",
        help="leave out what is of no layer of Wan2.1 (a text encoder's), which is refused else",
    )
    lora.add_argument(
        "--for",
        dest="model",
        type=Path,
        metavar="CHECKPOINT",
        help="refuse what does not fit the model of this native folder; with --skip-unmatched, "
        "what it has not (an image branch) is left out",
    )
    info = command("lora-info", "Say what an adapter does to which layers, and who would take it.")
    info.add_argument("src", type=Path, metavar="SRC", help=_SRC)

    merge = command("lora-merge", "Add adapters to a model.")
    merge.add_argument("base", type=Path, metavar="BASE", help="a native folder")
    merge.add_argument("out", type=Path, metavar="OUT", help="a folder; for comfyui, a file")
    merge.add_argument("adapters", nargs="+", metavar="ADAPTER[:STRENGTH]", help=_SRC)
    merge.add_argument(
        "--format",
        choices=("native", "official", "diffusers", "comfyui"),
        default="native",
        help="layout of what is written (default: native)",
    )
    extract = command("lora-extract", "Make an adapter of the difference of two checkpoints.")
    extract.add_argument("base", type=Path, metavar="BASE", help="a checkpoint of any kind")
    extract.add_argument("tuned", type=Path, metavar="TUNED", help="another of the same model")
    _add_output(extract, rank="rank of every matrix; norms and biases are kept whole")

    resize = command("lora-resize", "Make an adapter of a lesser rank, as near as can be.")
    resize.add_argument("src", type=Path, metavar="SRC", help=_SRC)
    _add_output(resize, rank="the new rank")


def _add_output(parser: argparse.ArgumentParser, rank: str | None = None) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="the safetensors file to write")
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        default="comfyui",
        help="comfyui (the default: ComfyUI, diffusers and diffusion-pipe read it), diffusers with "
        "its metadata, kohya or musubi (the same), or native",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="type of the file (default: float32, which changes nothing; native is always so)",
    )
    if rank is not None:
        parser.add_argument("--rank", type=int, required=True, help=rank)


def run(args: argparse.Namespace) -> str:
    """Run one of the commands; returns its report."""
    if args.command == "lora":
        from convert.lora import convert_lora

        asked = {"skip_unmatched": args.skip_unmatched, "model": args.model}
        return convert_lora(args.src, args.out, args.format, args.dtype, **asked)
    if args.command == "lora-info":
        from convert.lora_info import lora_info

        return lora_info(args.src)
    if args.command == "lora-merge":
        from convert.lora_merge import lora_merge

        return lora_merge(args.base, args.out, list(map(with_strength, args.adapters)), args.format)
    from convert.lora_svd import lora_extract, lora_resize

    if args.command == "lora-extract":
        return lora_extract(args.base, args.tuned, args.out, args.rank, args.format, args.dtype)
    return lora_resize(args.src, args.out, args.rank, args.format, args.dtype)


def with_strength(text: str) -> tuple[Path, float]:
    """`PATH` or `PATH:STRENGTH`."""
    from wanjax.checkpoint import split_choice

    path, colon, strength = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        number = float(strength)
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return Path(path), number
    if split_choice(Path(text))[0].exists():  # its name has a colon: wolves:2@best
        return Path(text), 1.0
    raise UserError(f"'{text}' has no number after its last colon; write PATH:0.8.")
