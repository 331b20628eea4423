"""Settings of the scripts: one dataclass a script, and presets, which are instances of them.

`python train.py PRESET --features ... --rank 16`: the preset gives the defaults of the job, the
command line overrides any of them. The architecture is never set here: it comes from the
checkpoint's own config.
"""

from configs.command_line import command_line, contradiction, parse_axes, parse_job, parse_mesh
from configs.jobs import EncodeJob, SampleJob, TrainJob
from configs.presets import PRESETS, Preset, check_preset

__all__ = [
    "PRESETS",
    "EncodeJob",
    "Preset",
    "SampleJob",
    "TrainJob",
    "check_preset",
    "command_line",
    "contradiction",
    "parse_axes",
    "parse_job",
    "parse_mesh",
]
