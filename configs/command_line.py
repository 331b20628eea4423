"""The command line over the presets: `SCRIPT PRESET --option value ...`."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro
from jax.sharding import Mesh

from configs.presets import PRESETS, Preset
from wanjax.errors import UserError, nearest
from wanjax.sharding import make_mesh

Job = TypeVar("Job")


def command_line(
    job_of: Callable[[Preset], Job], description: str, arguments: Sequence[str] | None = None
) -> tuple[str, Job]:
    """The chosen preset's name and the job, with the options of the command line put in."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # A mistyped preset deserves its nearest name, not the usage of a nested command line.
    if arguments and not arguments[0].startswith("-") and arguments[0] not in PRESETS:
        raise UserError(f"There is no preset '{arguments[0]}'{nearest(arguments[0], PRESETS)}")
    choices = {name: (preset.summary, job_of(preset)) for name, preset in PRESETS.items()}
    job = tyro.extras.overridable_config_cli(
        choices, description=description, args=arguments, config=(tyro.conf.FlagConversionOff,)
    )
    return arguments[0], job


def parse_mesh(text: str | None) -> Mesh | None:
    """`data=2,ring=1,ulysses=4` as a mesh; None stays None."""
    if text is None:
        return None
    axes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in ("data", "ring", "ulysses"):
            hint = nearest(name, ("data", "ring", "ulysses"))
            raise UserError(f"--mesh has an unknown axis '{name}'{hint}")
        if not size.isdigit():
            raise UserError(f"--mesh {text}: '{part}' is not AXIS=NUMBER; e.g. data=2,ulysses=4.")
        axes[name] = int(size)
    return make_mesh(**axes)
