"""Do FVD, its p-values and the temporal metrics tell what they should, on a film?

    python -m benchmarks.evaluation --tears FOLDER

FOLDER holds Tears of Steel's battle.webm, scene_0500.mp4 and cutlist.csv. 48 windows of 16 frames
at 24 fps, at most four of a shot, are compared with themselves under noise, shuffled, and frozen;
and random halves of the shots with each other, which are of one film and should pass as equal.
"""

import argparse
import csv
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from wanjax.data.clips import Shot, Window, windows
from wanjax.eval.bootstrap import bootstrap_distance
from wanjax.eval.distances import frechet, kernel_distance
from wanjax.eval.i3d import I3D, i3d_features
from wanjax.eval.significance import pooled_p, swap_p
from wanjax.eval.temporal import drift, flicker, motion, warping
from wanjax.progress import progress_bar

FRAMES, FPS, WINDOWS, OF_A_SHOT = 16, 24, 48, 4
NOISE = (5, 15, 40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tears", type=Path, required=True, help="folder of the two films")
    parser.add_argument("--splits", type=int, default=200, help="random halves of the shots")
    arguments = parser.parse_args()
    cut = film_windows(arguments.tears)
    films = [window.read().frames for window in cut]
    shots = [f"{window.shot.name}@{window.shot.start:g}" for window in cut]
    network = I3D()
    features = {"real": timed_features(network, films)}
    for name, change in changes().items():
        features[name] = features_of(network, [change(film) for film in films], name)
    show_distances(features, shots)
    show_p_values(features, np.asarray(shots), arguments.splits)
    show_temporal(films[::4])


def film_windows(folder: Path) -> list[Window]:
    """The first windows of every shot, four at most, 48 in all."""
    shots = []
    with (folder / "cutlist.csv").open() as file:
        for row in csv.DictReader(file):
            first, last = (int(row[key]) / 24 for key in ("start_frame", "end_frame_excl"))
            shots.append(Shot(folder / row["file"], row["file"], "", first, last))
    found = defaultdict(list)
    for window in windows([s for s in shots if s.end - s.start > 0.7], 17, FPS, 16, True):
        found[window.shot].append(window)
    few = [
        Window(w.name, w.shot, w.start, FRAMES, w.fps, w.info)
        for of_shot in found.values()
        for w in of_shot[:OF_A_SHOT]
    ]
    return few[:WINDOWS]


def changes() -> dict:
    """What is done to a film, by name; each film has noise of its own."""
    rng = np.random.default_rng(0)

    def noisy(sigma):
        return lambda film: np.clip(film + rng.normal(0, sigma, film.shape), 0, 255).astype(
            np.uint8
        )

    return {
        **{f"noise {sigma}": noisy(sigma) for sigma in NOISE},
        "shuffled": lambda film: film[rng.permutation(len(film))],
        "frozen": lambda film: np.repeat(film[:1], len(film), 0),
    }


def features_of(network: I3D, films: list[np.ndarray], name: str) -> np.ndarray:
    rows = []
    with progress_bar(name, len(films)) as bar:
        for film in films:
            rows.append(i3d_features(network, film[None])[0])
            bar.advance()
    return np.stack(rows)


def timed_features(network: I3D, films: list[np.ndarray]) -> np.ndarray:
    began, used = time.monotonic(), time.process_time()
    found = features_of(network, films, "real")
    wall, cpu = time.monotonic() - began, time.process_time() - used
    print(f"features of {len(films)} windows: {wall:.0f} s, {cpu:.0f} s of CPU, compiling included")
    return found


def show_distances(features: dict[str, np.ndarray], shots: list[str]) -> None:
    print(f"\n{len(shots)} windows of {len(set(shots))} shots against themselves, changed")
    for name in list(features)[1:]:
        sets = features["real"], features[name]
        fvd, kvd = (bootstrap_distance(f, sets, (shots, shots)) for f in (frechet, kernel_distance))
        p = swap_p(frechet, *sets, shots)
        print(f"  {name:10} FVD {fvd}   KVD {kvd}   p of equality (swaps) {p:.3f}")


def show_p_values(features: dict[str, np.ndarray], shots: np.ndarray, splits: int) -> None:
    """Halves of one film, which should pass as equal, and halves of which one is noisy."""
    rng, names = np.random.default_rng(0), np.unique(shots)
    alarms, found, distances = 0, 0, []
    with progress_bar("splits", splits) as bar:
        for seed in range(splits):
            first = np.isin(shots, rng.permutation(names)[: len(names) // 2])
            x, y = features["real"][first], features["real"][~first]
            distances.append(frechet(x, y))
            given = (shots[first].tolist(), shots[~first].tolist())
            alarms += pooled_p(frechet, x, y, *given, permutations=199, seed=seed) < 0.05
            y = features["noise 40"][~first]
            found += pooled_p(frechet, x, y, *given, permutations=199, seed=seed) < 0.05
            bar.advance()
    print(f"\nhalves by shot: FVD {np.mean(distances):.0f} on average")
    print(f"  declared different (p < 0.05): {alarms} of {splits}")
    print(f"  with noise 40 in one half, unpaired: {found} of {splits}")


def show_temporal(films: list[np.ndarray]) -> None:
    measures = flicker, motion, warping, drift
    print(f"\n{len(films)} windows: " + ", ".join(measure.__name__ for measure in measures))
    kept = {name: change for name, change in changes().items() if "noise" not in name}
    for name, change in {"real": np.asarray, **kept}.items():
        means = [np.mean([measure(change(film)) for film in films]) for measure in measures]
        print(f"  {name:10} " + "  ".join(f"{mean:7.3f}" for mean in means))


if __name__ == "__main__":
    main()
