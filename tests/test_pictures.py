"""Pictures: a file, a PIL image and an array are the same, whatever is odd about them."""

import struct

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from wanjax.errors import UserError
from wanjax.pictures import read_picture

LIMITS = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 36, 3)).astype(np.uint8)
GREY = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)


def as_rgb(grey):
    return np.repeat(grey[..., None], 3, -1)


def everywhere(path) -> np.ndarray:
    """What the file is, having seen that an open picture and an opened copy are the same."""
    read = read_picture(path)
    assert read.dtype == np.uint8 and read.ndim == 3 and read.shape[-1] == 3
    with Image.open(path) as picture:
        np.testing.assert_array_equal(read_picture(picture), read)
        np.testing.assert_array_equal(read_picture(picture.copy()), read)
    np.testing.assert_array_equal(read_picture(str(path)), read)
    np.testing.assert_array_equal(read_picture(read), read)
    return read


def test_pictures_of_every_kind_become_rgb(tmp_path):
    grey = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    images = {
        "l.png": Image.fromarray(grey),
        "sixteen.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "p.png": Image.fromarray(grey).convert("P"),
        "la.png": Image.fromarray(grey).convert("LA"),
        "cmyk.tif": Image.fromarray(grey).convert("RGB").convert("CMYK"),
    }
    for name, image in images.items():
        image.save(tmp_path / name)
        read = everywhere(tmp_path / name)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, np.repeat(grey[..., None], 3, -1), err_msg=name)


def test_transparency_lies_over_black(tmp_path):
    rgba = np.full((4, 6, 4), 200, np.uint8)
    rgba[:, :3, 3], rgba[:, 3:, 3] = 0, 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    read = everywhere(tmp_path / "a.png")
    assert (read[:, :3] == 0).all() and (read[:, 3:] == 200).all()


def test_exif_orientation_is_honoured(tmp_path):
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(image).save(tmp_path / "a.jpg", exif=exif, quality=95)
    read = everywhere(tmp_path / "a.jpg")
    assert read.shape == (32, 16, 3)
    assert read[:8].mean() > 240 and read[8:].mean() < 10


TURNED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize(("value", "turn"), TURNED.items())
@pytest.mark.parametrize("kind", ["rgb", "sixteen", "alpha"])
def test_every_orientation_of_every_kind(value, turn, kind, tmp_path):
    image, upright = {
        "rgb": (Image.fromarray(RGB), RGB),
        "sixteen": (Image.fromarray(GREY[:, :5].astype(np.uint16) * 257), as_rgb(GREY[:, :5])),
        "alpha": (Image.fromarray(np.dstack([RGB, np.full((20, 36), 255, np.uint8)])), RGB),
    }[kind]
    exif = Image.Exif()
    exif[0x0112] = value
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(everywhere(tmp_path / "a.png"), turn(upright))


def exif_with(*entries: bytes) -> bytes:
    """EXIF of little-endian entries, the first of which says "turn me clockwise by a quarter"."""
    turn = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
    count = struct.pack("<H", 1 + len(entries))
    return b"Exif\0\0II*\0\x08\0\0\0" + count + turn + b"".join(entries) + bytes(4)


BROKEN_EXIF = {
    "resolution -1/0": exif_with(struct.pack("<HHII", 0x11A, 10, 1, 38), struct.pack("<ii", -1, 0)),
    "resolution of text": exif_with(struct.pack("<HHI4s", 0x11A, 2, 4, b"abc\0")),
    "resolution of one digit": exif_with(
        struct.pack("<HHI4s", 0x11A, 2, 2, b"7\0"), struct.pack("<HHIHH", 0x128, 3, 1, 2, 0)
    ),
    "an entry beyond the end": exif_with(struct.pack("<HHII", 0x8769, 4, 1, 1 << 31)),
    "more entries than there are": exif_with(struct.pack("<HHII", 0x110, 2, 9**9, 1 << 31)),
}
JUNK_EXIF = {
    "noise": b"Exif\0\0" + RNG.bytes(300),
    "another orientation": exif_with().replace(struct.pack("<HH", 6, 0), struct.pack("<HH", 77, 0)),
    "cut off": exif_with()[:17],
    "empty": b"Exif\0\0",
}


@pytest.mark.parametrize("exif", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_broken_exif_still_turns_the_picture(exif, suffix, tmp_path):
    Image.fromarray(RGB).save(tmp_path / f"a.{suffix}", exif=exif)
    assert read_picture(tmp_path / f"a.{suffix}").shape == (36, 20, 3)


@pytest.mark.parametrize("exif", JUNK_EXIF.values(), ids=JUNK_EXIF)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_junk_for_exif_turns_nothing(exif, suffix, tmp_path):
    Image.fromarray(RGB).save(tmp_path / f"a.{suffix}", exif=exif)
    assert everywhere(tmp_path / f"a.{suffix}").shape == RGB.shape


@pytest.mark.parametrize("compressed", [False, True])
def test_a_png_may_carry_megabytes_of_text_and_profile(compressed, tmp_path):
    """As ComfyUI's do; Pillow's own limits are what they were afterwards."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("workflow", "x" * (3 << 20), zip=compressed)
    notes.add_itxt("prompt", "y" * (3 << 20), zip=compressed)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, icc in (("a", None), ("b", profile + bytes(2 << 20)), ("c", RNG.bytes(2 << 20))):
        Image.fromarray(RGB).save(tmp_path / f"{name}.png", pnginfo=notes, icc_profile=icc)
        np.testing.assert_array_equal(read_picture(tmp_path / f"{name}.png"), RGB)
    if not compressed:  # else Pillow itself refuses to open it
        with Image.open(tmp_path / "a.png") as picture:
            np.testing.assert_array_equal(read_picture(picture), RGB)
    assert LIMITS == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


P3 = np.array(
    [[0.51512, 0.29198, 0.1571], [0.2412, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]]
)


def matrix_profile(primaries: np.ndarray, gamma: float = 2.2) -> bytes:
    """An ICC profile of these primaries (columns, XYZ at D50)."""
    fixed = lambda *values: struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))  # noqa: E731
    curve = b"curv" + struct.pack(">IIHH", 0, 1, round(gamma * 256), 0)
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)}
    for name, column in zip((b"r", b"g", b"b"), primaries.T):
        tags |= {name + b"XYZ": b"XYZ " + bytes(4) + fixed(*column), name + b"TRC": curve}
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(data), len(tag))
        data += tag
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(">I", 128 + len(body)) + bytes(4) + b"\x02\x40\0\0mntrRGB XYZ "
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + body


def test_colours_are_converted_by_the_profile(tmp_path):
    """Display P3's colours against the arithmetic of its matrices."""
    linear = np.linalg.inv(SRGB) @ P3 @ ((RGB / 255) ** 2.2).reshape(-1, 3).T
    linear = np.clip(linear, 0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    wanted = (255 * curved).T.reshape(RGB.shape)
    alpha = np.full((20, 36), 255, np.uint8)
    palette = Image.fromarray(RGB).quantize(4)
    for name, image in {
        "rgb.png": Image.fromarray(RGB),
        "rgba.png": Image.fromarray(np.dstack([RGB, alpha])),
    }.items():
        image.save(tmp_path / name, icc_profile=matrix_profile(P3))
        assert np.abs(everywhere(tmp_path / name) - wanted).max() < 3
        assert np.abs(RGB - wanted).max() > 20
    palette.save(tmp_path / "p.png", icc_profile=matrix_profile(P3))
    assert np.abs(read_picture(tmp_path / "p.png").astype(int) - palette.convert("RGB")).max() > 5
    # What is of another space, or broken, changes nothing.
    for icc in (matrix_profile(P3).replace(b"RGB ", b"CMYK"), matrix_profile(P3)[:200], b"junk"):
        Image.fromarray(RGB).save(tmp_path / "a.png", icc_profile=icc)
        np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), RGB)


ALPHA = np.linspace(0, 1, 8)[:, None].repeat(8, 1)
ARRAYS = {
    "uint8": (as_rgb(GREY), as_rgb(GREY)),
    "grey": (GREY, as_rgb(GREY)),
    "one channel": (GREY[..., None], as_rgb(GREY)),
    "uint16": (as_rgb(GREY).astype(np.uint16) * 257, as_rgb(GREY)),
    "big-endian uint16": (GREY.astype(">u2") * 257, as_rgb(GREY)),
    "float32": (as_rgb(GREY).astype(np.float32) / 255, as_rgb(GREY)),
    "float64": (GREY / 255, as_rgb(GREY)),
    "bfloat16": (jnp.asarray([[0.0, 0.5, 1.0]], jnp.bfloat16), as_rgb(np.array([[0, 128, 255]]))),
    "rgba": (
        np.dstack([as_rgb(GREY), np.round(ALPHA * 255).astype(np.uint8)]),
        np.round(as_rgb(GREY) * np.round(ALPHA * 255)[..., None] / 255),
    ),
    "float rgba": (
        np.dstack([as_rgb(GREY) / 255, ALPHA]),
        np.round(as_rgb(GREY) * ALPHA[..., None]),
    ),
    "grey with alpha": (np.dstack([GREY / 255, 0 * ALPHA]), 0 * as_rgb(GREY)),
    "a view": (as_rgb(GREY)[::-1, ::2], as_rgb(GREY)[::-1, ::2]),
}


@pytest.mark.parametrize(("array", "wanted"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_of_every_kind(array, wanted):
    read = read_picture(array)
    assert read.dtype == np.uint8 and read.flags.c_contiguous
    np.testing.assert_array_equal(read, wanted)


def test_transparency_is_the_same_in_a_file_and_an_array(tmp_path):
    rgba = np.dstack([RGB, RNG.integers(0, 256, RGB.shape[:2]).astype(np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(everywhere(tmp_path / "a.png"), read_picture(rgba))


NONE = {
    "bool": (GREY > 3, "array of bool; give uint8"),
    "complex": (GREY * 1j, "array of complex128"),
    "objects": (np.array([[None, 1]]), "array of object"),
    "int64": (GREY.astype(int), "array of int64"),
    "uint32": (GREY.astype(np.uint32), "array of uint32"),
    "floats to 255": (GREY.astype(float), "floats from 0 to 252; give floats from 0 to 1"),
    "floats from -1": (GREY / 127.5 - 1, "floats from -1 to"),
    "NaN": (np.full((4, 4), np.nan), "floats from nan"),
    "channels first": (np.zeros((3, 20, 36), np.uint8), r"array \[3, 20, 36\]; give one \[H W 3"),
    "a batch": (RGB[None], r"array \[1, 20, 36, 3\]"),
    "a row": (RGB[0, 0], r"array \[3\]"),
    "nothing": (np.zeros((0, 8, 3), np.uint8), r"array \[0, 8, 3\]"),
    "a number": (7, r"array \[\]"),
    "bytes": (b"\x89PNG", r"array \[\]"),
    "ragged lists": ([[1, 2], [3]], "no array of numbers"),
    "a float picture": (Image.fromarray(GREY.astype(np.float32)), "floats from 0 to 252"),
    "a picture of 32 bits": (Image.fromarray(GREY.astype(np.int32) * 9999), "more than 16 bits"),
}


@pytest.mark.parametrize(("given", "match"), NONE.values(), ids=NONE)
def test_what_is_no_picture_is_refused(given, match):
    with pytest.raises(UserError, match=match):
        read_picture(given)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif", "avif"])
def test_a_picture_that_is_cut_off_is_refused(suffix, tmp_path):
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(
        tmp_path / f"whole.{suffix}"
    )
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for part in (0.0, 0.02, 0.3, 0.6, 0.9):
        path.write_bytes(data[: int(len(data) * part)])
        with pytest.raises(UserError, match=rf"cut\.{suffix} cannot be read as a picture"):
            read_picture(path)


def test_files_that_are_no_pictures_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(UserError, match=r"a\.png cannot be read as a picture .*PNG or JPEG"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"There is no picture .*c\.png"):
        read_picture(tmp_path / "c.png")
    with pytest.raises(UserError, match="is a folder and not a picture"):
        read_picture(tmp_path)

    def closed(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", closed)
    with pytest.raises(UserError, match=r"a\.png may not be read; change its permissions"):
        read_picture(tmp_path / "a.png")


def test_a_picture_of_far_too_many_pixels_is_refused(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", RGB.size // 3 // 2 - 1)
    with pytest.raises(UserError, match=r"a\.png is too large a picture .*; make it smaller"):
        read_picture(tmp_path / "a.png")
