"""Video: frames by time, colours, orientation, errors that name the file."""

import resource
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from wanjax.data.decoding import Converter
from wanjax.data.probing import probe
from wanjax.data.video import read_video, write_video
from wanjax.errors import UserError

ASSETS = Path(__file__).resolve().parents[1] / "../shared/assets"
STEP = 4  # grey levels between the frames of a counter


def counter(path, times_ms, rate=24, size=(48, 32), **options):
    """A video whose frame i has brightness `STEP * i` and is shown from `times_ms[i]` on."""
    with av.open(str(path), "w") as container:
        rate = Fraction(rate).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 90000)
        stream.options = {"crf": "4", "g": "12", **options}
        for index, time in enumerate(times_ms):
            image = np.full((size[1], size[0], 3), STEP * index, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = round(time * 90), Fraction(1, 90000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(frames):
    return np.round(frames.mean((1, 2, 3)) / STEP).astype(int).tolist()


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])  # the latter rounds its times to milliseconds
@pytest.mark.parametrize("rate", [24, 25, 30, 12])
def test_frames_are_those_shown_at_the_time(tmp_path, rate, suffix):
    path = counter(tmp_path / f"a.{suffix}", [1000 * i / rate for i in range(48)], rate)
    frames, source_rate = read_video(path, fps=16)
    expected = [int((k / 16 + 1e-3) * rate) for k in range(len(frames))]
    assert numbers(frames) == expected
    assert source_rate == pytest.approx(rate, rel=1e-3)
    assert len(frames) == probe(path).count(16) == int(np.ceil(48 / rate * 16 - 0.02))


def test_24_to_16_takes_two_of_three(tmp_path):
    path = counter(tmp_path / "a.mp4", [1000 * i / 24 for i in range(12)])
    assert numbers(read_video(path, fps=16)[0]) == [0, 1, 3, 4, 6, 7, 9, 10]


def test_variable_rate_is_resampled_by_time(tmp_path):
    times = [0, 10, 20, 500, 520, 1000, 1100]  # a burst, a long hold, a burst
    frames, _ = read_video(counter(tmp_path / "a.mp4", times), fps=10)
    shown = [max(i for i, time in enumerate(times) if time <= 100 * k) for k in range(12)]
    assert numbers(frames) == shown


@pytest.mark.parametrize("start", [0.0, 0.25, 1.5, 1.7083333])
def test_start_seeks_to_the_same_frames(tmp_path, start):
    path = counter(tmp_path / "a.mp4", [1000 * i / 24 for i in range(60)])
    whole, _ = read_video(path)
    assert numbers(whole) == list(range(60))
    part, _ = read_video(path, start=start, frames=9)
    np.testing.assert_array_equal(part, whole[int(start * 24 + 0.01) :][:9])
    resampled, _ = read_video(path, fps=16, start=start, frames=5)
    expected = [int((start + k / 16) * 24 + 0.03) for k in range(5)]
    assert numbers(resampled) == expected


def test_a_first_timestamp_that_is_not_zero_counts_as_zero(tmp_path):
    path = counter(tmp_path / "a.mkv", [3000 + 1000 * i / 24 for i in range(36)])
    assert probe(path).duration == pytest.approx(1.5, abs=2e-3)
    assert numbers(read_video(path, fps=24, start=1.25, frames=3)[0]) == [30, 31, 32]


def test_probe_counts(tmp_path):
    info = probe(counter(tmp_path / "a.mp4", [40 * i for i in range(33)], 25, (64, 48)))
    assert (info.width, info.height, info.frames) == (64, 48, 33)
    assert info.fps == pytest.approx(25)
    assert info.duration == pytest.approx(33 / 25)


def test_colours_survive_a_round_trip(tmp_path):
    time, y, x = np.mgrid[0:9, 0:128, 0:192]
    # Strong hues, so that a wrong matrix or range shows at once.
    waves = [np.sin((x + 3 * time) / 20), np.sin(y / 15), np.sin((x + y) / 25)]
    video = 0.5 + 0.5 * np.stack(waves, -1)
    write_video(tmp_path / "a.mp4", video.astype(np.float32))
    back, rate = read_video(tmp_path / "a.mp4")
    error = back - 255 * video
    print("colour error", np.abs(error).mean(), "bias", error.mean((0, 1, 2)))
    assert rate == 16
    assert np.abs(error).mean() < 2  # what 8-bit 4:2:0 and crf 17 cost; another matrix costs 7
    assert np.abs(error.mean((0, 1, 2))).max() < 0.5  # another matrix: 5
    solid = np.broadcast_to(np.array([200, 30, 90], np.uint8), (5, 32, 32, 3))
    write_video(tmp_path / "b.mp4", solid)
    difference = read_video(tmp_path / "b.mp4")[0].astype(int) - solid
    assert np.abs(difference).max() <= 2


def test_the_same_frames_make_the_same_file(tmp_path):
    y, x = np.mgrid[0:64, 0:96]
    frames = [(128 + 99 * np.sin((x + y * k) / 20))[..., None] * np.ones(3) for k in range(5)]
    files = set()
    for _ in range(12):  # x264's default: 6 files of 120
        write_video(tmp_path / "a.mp4", np.stack(frames).astype(np.uint8))
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1


def test_tags_and_layout_of_what_is_written(tmp_path):
    write_video(tmp_path / "a.mp4", np.zeros((9, 32, 48, 3), np.uint8), fps=16)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 16)
        assert context.colorspace == context.color_primaries == context.color_trc == 1
        assert context.color_range == 1
        assert (stream.frames, float(stream.duration * stream.time_base)) == (9, 9 / 16)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(("height", "matrix"), [(64, (0.299, 0.114)), (720, (0.2126, 0.0722))])
def test_untagged_colours_follow_the_height(tmp_path, height, matrix):
    red, blue = matrix
    rgb = np.array([0.8, 0.3, 0.5])
    luma = red * rgb[0] + (1 - red - blue) * rgb[1] + blue * rgb[2]
    chroma = (rgb[2] - luma) / (2 - 2 * blue), (rgb[0] - luma) / (2 - 2 * red)
    levels = [round(16 + 219 * luma), *(round(128 + 224 * c) for c in chroma)]
    planes = [np.full((height // s) * (64 // s), v, np.uint8) for s, v in zip((1, 2, 2), levels)]
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, height, "yuv420p"
        stream.options = {"qp": "0"}
        picture = np.concatenate(planes).reshape(height * 3 // 2, 64)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "yuv420p")))
        container.mux(stream.encode())
    frames, _ = read_video(tmp_path / "a.mp4")
    assert np.abs(frames[0, 9, 9] - 255 * rgb).max() < 3


def _oriented(path, degrees, mirrored=False, aspect=Fraction(1)):
    corner = np.zeros((32, 64, 3), np.uint8)
    corner[:8, :16] = 255  # the top left corner is white
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        stream.set_display_rotation(degrees, hflip=mirrored)
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(corner, "rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("degrees", "mirrored", "corner"),
    [
        (0, False, (0, 0)),
        (90, False, (-1, 0)),  # counter-clockwise: top left goes to bottom left
        (-90, False, (0, -1)),
        (180, False, (-1, -1)),
        (0, True, (0, -1)),
        (90, True, (-1, -1)),
    ],
)
def test_phone_videos_stand_upright(tmp_path, degrees, mirrored, corner):
    path = _oriented(tmp_path / "a.mp4", degrees, mirrored)
    frames, _ = read_video(path)
    info = probe(path)
    assert frames.shape[1:3] == ((64, 32) if abs(degrees) == 90 else (32, 64))
    assert (info.height, info.width) == frames.shape[1:3]
    white = {(y, x): frames[2, y, x, 0] > 200 for y in (0, -1) for x in (0, -1)}
    assert [where for where, is_white in white.items() if is_white] == [corner]


def test_pixels_that_are_not_square_are_widened(tmp_path):
    path = _oriented(tmp_path / "a.mp4", 0, aspect=Fraction(3, 2))
    assert read_video(path)[0].shape[1:3] == (32, 96)
    assert (probe(path).width, probe(path).height) == (96, 32)


def test_what_cannot_be_read_is_named(tmp_path):
    good = counter(tmp_path / "good.mp4", [1000 * i / 24 for i in range(48)])
    text = tmp_path / "text.mp4"
    text.write_text("not a video at all")
    with pytest.raises(UserError, match=r"text\.mp4 cannot be read as a video .* export it"):
        read_video(text)
    with pytest.raises(UserError, match=r"There is no video .*absent\.mp4"):
        probe(tmp_path / "absent.mp4")
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    with pytest.raises(UserError, match=r"picture\.png .*it is a picture"):
        probe(tmp_path / "picture.png")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
    with pytest.raises(UserError, match=r"sound\.wav .*no video stream"):
        probe(tmp_path / "sound.wav")
    with pytest.raises(UserError, match=r"good\.mp4 ends after 16 of the 33 frames"):
        read_video(good, fps=16, start=1.0, frames=33)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("kept", [0.3, 0.55, 0.8])
def test_a_truncated_video_is_refused(tmp_path, suffix, kept):
    source = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (96, 32, 48, 3), np.uint8)
    write_video(tmp_path / "a.mp4", noise)
    if suffix == "mkv":
        with av.open(str(tmp_path / "a.mp4")) as old, av.open(str(source), "w") as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    new.mux(packet)
    assert probe(source).frames == 96
    data = source.read_bytes()
    source.write_bytes(data[: int(kept * len(data))])
    for read in (probe, read_video):
        with pytest.raises(UserError, match=rf"a\.{suffix} .*cut off"):
            read(source)


def test_hdr_is_refused(tmp_path):
    path = counter(tmp_path / "a.mp4", [0, 40, 80], **{"x264-params": "transfer=arib-std-b67"})
    with pytest.raises(UserError, match=r"a\.mp4 is HDR.*SDR"):
        read_video(path)


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"33x48.*even sizes; crop to 32x48"):
        write_video(tmp_path / "a.mp4", np.zeros((5, 48, 33, 3), np.uint8))
    with pytest.raises(UserError, match=r"ends in \.mp4"):
        write_video(tmp_path / "a.avi", np.zeros((5, 48, 32, 3), np.uint8))
    with pytest.raises(UserError, match="NaN"):
        write_video(tmp_path / "a.mp4", np.full((5, 48, 32, 3), np.nan, np.float32))
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # stands in for a full disk
    try:
        with pytest.raises(UserError, match=r"a\.mp4 could not be written"):
            write_video(tmp_path / "a.mp4", noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not ASSETS.exists(), reason="the real clips are not here")
@pytest.mark.parametrize(
    ("name", "size", "frames", "seconds"),
    [
        ("tears_of_steel/battle.webm", (800, 332), 1691, 70.458),
        ("other_clips/big_buck_bunny.mp4", (854, 480), 720, 30),
        ("wan_outputs/Wan2.1_14B_i2v.mp4", (480, 832), 33, 33 / 16),
    ],
)
def test_real_films(name, size, frames, seconds):
    info = probe(ASSETS / name)
    assert (info.width, info.height) == size and info.frames == frames
    assert info.duration == pytest.approx(seconds, abs=2e-3)
    start = info.duration / 2
    ours, _ = read_video(ASSETS / name, fps=16, start=start, frames=5)
    with av.open(str(ASSETS / name)) as container:  # no seeking: every frame from the beginning
        decoded = [(f.time, f) for f in container.decode(video=0) if f.time < start + 1]
        rgb = Converter(container.streams.video[0])
    for k, mine in enumerate(ours):
        frame = [f for time, f in decoded if time <= start + k / 16 + 1e-3][-1]
        assert np.abs(mine.astype(int) - rgb(frame)).max() == 0
