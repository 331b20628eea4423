"""Presets: named defaults for each kind of model. Numbers are those of Wan's own `generate.py`."""

from dataclasses import dataclass, replace
from pathlib import Path

from configs.jobs import EncodeJob, SampleJob, TrainJob
from wanjax.errors import UserError
from wanjax.models.dit import DiTConfig
from wanjax.models.presets import ARCHITECTURES
from wanjax.training import TrainConfig


@dataclass(frozen=True)
class Preset:
    """Defaults of every script for one kind of model."""

    summary: str
    encode: EncodeJob
    train: TrainJob
    sample: SampleJob


def _preset(
    summary: str, area: int, steps: int, shift: float, train_shift: float | None = None
) -> Preset:
    return Preset(
        summary,
        EncodeJob(area=area),
        TrainJob(settings=TrainConfig(shift=train_shift or shift)),
        SampleJob(area=area, steps=steps, shift=shift, guidance=5.0),
    )


_HD, _SD = 720 * 1280, 480 * 832
_NANO_AREA = 64 * 114  # 64x112 for a 16:9 picture

PRESETS: dict[str, Preset] = {
    "i2v_14b_720p": _preset("Wan2.1 I2V-14B at 720p", _HD, steps=40, shift=5.0),
    "i2v_14b_480p": _preset("Wan2.1 I2V-14B at 480p", _SD, steps=40, shift=3.0),
    # Sampling at 16 spends nearly all steps on high noise; training is to see all of it.
    "flf2v_14b_720p": _preset(
        "Wan2.1 first and last frame, 720p", _HD, steps=50, shift=16.0, train_shift=5.0
    ),
    "t2v_14b": _preset("Wan2.1 T2V-14B at 720p", _HD, steps=50, shift=5.0),
    "t2v_1_3b": _preset("Wan2.1 T2V-1.3B at 480p", _SD, steps=50, shift=5.0),
    "nano": Preset(
        "assets/nano: toy widths, for two CPU cores (it knows --height 64 --width 160)",
        EncodeJob(area=_NANO_AREA, stride=4, dtype="float32"),
        TrainJob(
            settings=TrainConfig(
                rank=16,
                alpha=16.0,
                targets="all",
                steps=300,
                batch=4,
                learning_rate=2e-3,
                shift=3.0,
                dtype="float32",
                remat="none",
            )
        ),
        # assets/nano was trained without dropped captions, so it is sampled unguided.
        replace(
            SampleJob(),
            area=_NANO_AREA,
            frames=33,
            steps=20,
            guidance=1.0,
            shift=3.0,
            dtype="float32",
        ),
    ),
}


def check_preset(name: str, checkpoint: Path, config: DiTConfig) -> None:
    """Refuse a preset that is for another kind of model than the one in `checkpoint`. One whose
    size no preset has may be used with all that are for its kind, and with nano."""
    kinds = {preset: ARCHITECTURES[preset]["dit"] for preset in PRESETS}
    fitting = [p for p, c in kinds.items() if (c.kind, c.dim) == (config.kind, config.dim)]
    of_kind = [p for p, c in kinds.items() if c.kind == config.kind or p == "nano"]
    if name not in (fitting or of_kind):
        raise UserError(
            f"The preset {name} is for {PRESETS[name].summary}, and {checkpoint} holds a model for "
            f"{config.kind} with {config.dim:,} channels; use {' or '.join(fitting or of_kind)}."
        )
