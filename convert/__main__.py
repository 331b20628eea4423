"""`python -m convert`: checkpoints and adapters in, out, and looked at."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convert import lora_commands
from convert.export import FORMATS, export
from convert.inspect import inspect
from convert.native import convert_pipeline
from wanjax.errors import UserError, nearest, run_script
from wanjax.models import NETWORKS
from wanjax.tensor_files import DTYPES

_DTYPES = {"float32": DTYPES["F32"], "bfloat16": DTYPES["BF16"]}

_OPTIONS = ("--dtype", "--only", "--format", "--from", "--delete-source", "--skip-unmatched")
_OPTIONS += ("--for", "--rank", "--help")

_EXAMPLES = f"""\
examples:
  # the official checkpoint, as `hf download` left it, or diffusers' copy of it
  python -m convert pipeline Wan2.1-I2V-14B-720P checkpoints/i2v_14b_720p
  # half the size on the disk; what is computed in float32 (norms, VAE, ...) stays in float32
  python -m convert pipeline Wan2.1-I2V-14B-720P checkpoints/i2v_14b_720p --dtype bfloat16
  # on a disk that does not hold both: 82 GB of source become 47 GB
  python -m convert pipeline Wan2.1-I2V-14B-720P NEW --dtype bfloat16 --delete-source
  # ComfyUI's files: one of them, or a folder of them
  python -m convert pipeline wan2.1_i2v_720p_14B_bf16.safetensors checkpoints/dit_only
  # back again; --from puts back what we do not keep (the text half of CLIP)
  python -m convert export checkpoints/i2v_14b_720p OUT --format official --from Wan2.1-I2V-14B-720P
  python -m convert export checkpoints/i2v_14b_720p OUT --format diffusers
  python -m convert export checkpoints/i2v_14b_720p model.safetensors --format comfyui
{lora_commands.EXAMPLES}  # what is this?
  python -m convert inspect anything.safetensors
"""


class _Parser(argparse.ArgumentParser):
    """Usage errors are one sentence like all others, with the nearest names after a typo."""

    def error(self, message: str) -> None:
        raise UserError(f"{message[0].upper()}{message[1:]}; see {self.prog} --help.")

    def _check_value(self, action: argparse.Action, value: str) -> None:
        if action.choices is not None and value not in action.choices:
            what = action.option_strings[0] if action.option_strings else "command"
            raise UserError(f"'{value}' is no {what}{nearest(value, action.choices)}")


def _networks(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in NETWORKS:
            raise UserError(f"'{name}' is no network{nearest(name, NETWORKS)}")
    return names


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="python -m convert", description=__doc__, epilog=_EXAMPLES, formatter_class=form
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        mine = "\n".join(_examples(name))
        return commands.add_parser(
            name, help=text, description=text, epilog=mine, formatter_class=form
        )

    only = {
        "type": _networks,
        "default": (),
        "metavar": "NAMES",
        "help": f"only these networks, of {','.join(NETWORKS)}",
    }
    pipeline = command("pipeline", "Make a native folder of an official, diffusers or ComfyUI one.")
    pipeline.add_argument("src", type=Path, metavar="SRC", help="a folder, or one safetensors file")
    pipeline.add_argument("dst", type=Path, metavar="DST", help="the native folder to write")
    pipeline.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="type of the large matrices (default: each tensor keeps its type)",
    )
    pipeline.add_argument("--only", **only)
    pipeline.add_argument(
        "--delete-source",
        action="store_true",
        help="delete each file of weights in SRC once it is safely written, to need less disk; "
        "after an interruption the same command goes on",
    )

    out = command("export", "Write a native folder in another format.")
    out.add_argument("folder", type=Path, metavar="DST", help="the native folder")
    out.add_argument("out", type=Path, metavar="OUT", help="a folder; for comfyui, a file")
    out.add_argument("--format", choices=FORMATS, required=True)
    out.add_argument(
        "--from",
        dest="origin",
        type=Path,
        metavar="SRC",
        help="the checkpoint it was made of, whence dropped tensors are put back",
    )
    out.add_argument("--only", **only)

    lora_commands.add(command)

    look = command("inspect", "Say what a file or folder is: kind, sizes, types, what is amiss.")
    look.add_argument("path", type=Path, metavar="PATH")
    return parser


def _examples(command: str) -> list[str]:
    """The examples above that show one command, with the remarks before them."""
    lines, kept, remark = _EXAMPLES.splitlines(), ["examples:"], []
    for line in lines[1:]:
        if line.startswith("  #"):
            remark = [line]
        elif f"convert {command} " in line:
            kept += [*remark, line]
            remark = []
    return kept


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; reports go to stdout, progress and errors to stderr."""
    args, unknown = _parser().parse_known_args(arguments)
    if unknown:
        raise UserError(
            f"'{unknown[0]}' is no argument of {args.command}{nearest(unknown[0], _OPTIONS)}"
        )
    if args.command == "pipeline":
        dtype: np.dtype | None = _DTYPES.get(args.dtype)
        report = convert_pipeline(args.src, args.dst, dtype, args.only, args.delete_source)
    elif args.command == "export":
        report = export(args.folder, args.out, args.format, origin=args.origin, only=args.only)
    elif args.command.startswith("lora"):
        report = lora_commands.run(args)
    else:
        report = inspect(args.path)
    sys.stdout.write(report + "\n")


if __name__ == "__main__":
    run_script(main)
