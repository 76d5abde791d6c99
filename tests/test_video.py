import base64
import io
import struct
import sys
import wave
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from onevision_edge.errors import OneVisionError
from onevision_edge.runtime import video as video_module
from onevision_edge.runtime.images import ImageProcessor
from onevision_edge.runtime.video import load_video, sample_indices

WIDTH, HEIGHT, LENGTH = 96, 64, 40


def grey(index, total=LENGTH):
    """The brightness of frame `index` of the test videos: it grows from 0 to 255, so it tells the frame."""
    return round(index * 255 / (total - 1))


def encoded(format="mp4", codec="mpeg4", frames=LENGTH, rate=10, container_options=None, **options):
    av = pytest.importorskip("av")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "video"  # a file, because faststart reads back what it wrote
        with av.open(str(path), "w", format=format, options=container_options or {}) as container:
            stream = container.add_stream(codec, rate=rate)
            stream.bit_rate = 8_000_000
            stream.options = {name: str(value) for name, value in options.items()}
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for index in range(frames):
                picture = np.full((HEIGHT, WIDTH, 3), grey(index, frames), np.uint8)
                picture[:16, :16] = (255, 0, 0)  # top left
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        return path.read_bytes()


@pytest.fixture(scope="module")
def mp4():
    return encoded()


def shown(frames):
    """The frame numbers the brightness of each picture stands for."""
    return [round(frame.getpixel((60, 50))[0] * (LENGTH - 1) / 255) for frame in frames]


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("total", "frames", "expected"),
    [
        (10, 10, list(range(10))),
        (10, 4, [0, 3, 6, 9]),
        (6, 3, [0, 2, 5]),  # 2.5 goes to the even 2
        (100, 1, [0]),
        (3, 32, [0, 1, 2]),
        (1, None, [0]),
    ],
)
def test_uniform_indices(total, frames, expected):
    assert sample_indices(total, frames=frames) == expected


def test_the_default_is_32_frames():
    assert sample_indices(1000) == sample_indices(1000, frames=32)
    assert len(sample_indices(1000)) == 32


@pytest.mark.parametrize(
    ("total", "source_fps", "fps", "count"),
    [
        (300, 30, 2, 20),
        (300, 29.97, 2, 20),  # 20.02
        (310, 30, 2, 20),  # 20.67, down to even
        (30, 30, 2, 4),  # 2, up to the least
        (90_000, 30, 2, 768),  # 6000, down to the most
        (5, 1, 10, 4),  # no more than there are, even
        (3, 1, 10, 2),
        (1, 1, 10, 1),
        (100, Fraction(25), 25, 100),
    ],
)
def test_indices_by_fps(total, source_fps, fps, count):
    indices = sample_indices(total, fps=fps, source_fps=source_fps)
    assert indices == sample_indices(total, frames=count)
    assert len(indices) == count


@given(total=st.integers(1, 10_000), frames=st.integers(1, 1000))
def test_indices_ascend_within_the_video(total, frames):
    indices = sample_indices(total, frames=frames)
    assert len(indices) == min(total, frames)
    assert indices[0] == 0
    assert indices[-1] == (total - 1 if frames > 1 else 0)
    steps = np.diff(indices)
    assert (steps > 0).all()
    assert len(steps) == 0 or steps.max() - steps.min() <= 2


@given(total=st.integers(1, 10_000), fps=st.floats(0.01, 240), source_fps=st.floats(0.1, 240))
def test_counts_by_fps_keep_the_limits(total, fps, source_fps):
    count = len(sample_indices(total, fps=fps, source_fps=source_fps, min_frames=5, max_frames=41))
    assert count == 1 if total == 1 else count % 2 == 0
    assert count <= min(total, 40)
    assert count >= min(6, total - total % 2)


@pytest.mark.parametrize(
    ("total", "options", "words"),
    [
        (10, {"frames": 4, "fps": 2}, "not both"),
        (10, {"frames": 0}, "positive whole number, not 0"),
        (10, {"frames": -3}, "positive whole number"),
        (10, {"frames": 2.5}, "positive whole number"),
        (10, {"fps": 2}, "no frame rate"),
        (10, {"fps": 0, "source_fps": 30}, "fps must be a positive"),
        (10, {"fps": float("nan"), "source_fps": 30}, "fps must be a positive"),
        (10, {"fps": 2, "source_fps": 0}, "source's frame rate"),
        (0, {}, "no frames"),
    ],
)
def test_sampling_refused(total, options, words):
    with pytest.raises(OneVisionError, match=words):
        sample_indices(total, **options)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("format", "codec", "options"),
    [
        ("mp4", "mpeg4", {}),
        ("mp4", "libx264", {"bf": 3, "g": 12}),
        ("matroska", "libx264", {}),
        ("webm", "libvpx", {"auto-alt-ref": 1, "lag-in-frames": 16}),
        ("mpegts", "mpeg2video", {}),
        ("avi", "mpeg4", {"bf": 2}),
    ],
)
def test_containers_give_the_frames_asked_for(format, codec, options):
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no {codec}")
    data = encoded(format, codec, **options)
    assert shown(load_video(data, frames=5)) == [0, 10, 20, 29, 39]
    assert shown(load_video(data, fps=2)) == sample_indices(LENGTH, frames=8)
    assert shown(load_video(data)) == sample_indices(LENGTH, frames=32)
    assert shown(load_video(data, frames=100)) == list(range(LENGTH))


def test_every_spelling_of_one_file_is_the_same(mp4, tmp_path):
    path = tmp_path / "a b.mp4"
    path.write_bytes(mp4)
    url = f"data:video/mp4;base64,{base64.b64encode(mp4).decode()}"
    for source in (path, str(path), path.as_uri(), mp4, url):
        frames = load_video(source, frames=3)
        assert shown(frames) == [0, 20, 39]
        assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (WIDTH, HEIGHT))}


def test_a_file_that_does_not_say_its_length():
    data = encoded("mp4", container_options={"movflags": "frag_keyframe+empty_moov"})
    assert shown(load_video(data, frames=3)) == [0, 20, 39]


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [
        ((0, 1, -1, 0), (-1, 0)),  # a quarter turn clockwise, as phones held upright write it
        ((0, -1, 1, 0), (0, -1)),
        ((-1, 0, 0, -1), (-1, -1)),
        ((1, 0, 0, 1), (0, 0)),
    ],
)
def test_the_display_matrix_is_applied(mp4, matrix, corner):
    if not hasattr(pytest.importorskip("av").VideoFrame, "rotation"):
        pytest.skip("this PyAV does not tell the rotation of a frame; 14.2 does")
    a, b, c, d = (number * 65_536 for number in matrix)
    turned = bytearray(mp4)
    at = mp4.index(b"tkhd") + 44  # ISO/IEC 14496-12, track header of version 0
    turned[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    frame = load_video(bytes(turned), frames=2)[0]
    sideways = matrix[0] == 0
    assert frame.size == ((HEIGHT, WIDTH) if sideways else (WIDTH, HEIGHT))
    x, y = (4 if side == 0 else length - 5 for side, length in zip(corner, frame.size, strict=True))
    red, green, blue = frame.getpixel((x, y))
    assert red > 200
    assert max(green, blue) < 60


def test_packets_without_a_picture_are_not_counted(mp4, monkeypatch):
    survey = video_module._survey
    monkeypatch.setattr(video_module, "_survey", lambda av, file: (survey(av, file)[0] + 5, 10.0))
    assert shown(load_video(mp4, frames=5)) == [0, 10, 20, 29, 39]


def test_only_the_chosen_frames_are_converted(mp4, monkeypatch):
    converted = []
    upright = video_module._upright
    monkeypatch.setattr(video_module, "_upright", lambda frame: converted.append(1) or upright(frame))
    load_video(mp4, frames=3)
    assert len(converted) == 3


# ---------------------------------------------------------------- hostile files


@pytest.mark.parametrize("part", [0.2, 0.5, 0.7])
@pytest.mark.parametrize(("format", "movflags"), [("mp4", ""), ("mp4", "faststart"), ("matroska", ""), ("avi", "")])
def test_truncated_files(format, movflags, part, tmp_path):
    data = encoded(format, container_options={"movflags": movflags} if movflags else None, g=5)
    assert movflags == "" or data.index(b"moov") < data.index(b"mdat")
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(OneVisionError, match=r"^video .*cut\.mp4: "):
        load_video(path, frames=4)


def test_damaged_bytes_give_frames_or_the_one_error(mp4):
    rng = np.random.default_rng(5)
    outcomes = []
    for _ in range(30):
        broken = bytearray(mp4)
        for at in rng.integers(0, len(mp4), 6):
            broken[at] = rng.integers(256)
        try:
            outcomes.append(len(load_video(bytes(broken), frames=4)))
        except OneVisionError as error:
            outcomes.append(str(error)[:7])
    assert set(outcomes) <= {1, 2, 3, 4, "video: "}


def test_sound_without_a_picture():
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
        sound.writeframes(bytes(16_000))
    pytest.importorskip("av")
    with pytest.raises(OneVisionError, match="there is no video in it"):
        load_video(file.getvalue())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"", "no bytes"),
        (b"this is no video", "cannot be decoded"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "cannot be decoded"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "cannot be decoded"),
        ("https://example.com/cat.mp4", "not fetched"),
        ("nowhere.mp4", "video nowhere.mp4: no such file"),
        ("a\0b.mp4", "video a"),
        (None, "NoneType"),
        (7, "int"),
        (np.zeros((4, 4, 3), np.uint8), "must be"),
        (Image.new("RGB", (4, 4)), "single image"),
        ([], "no frames"),
    ],
)
def test_sources_refused(source, words):
    pytest.importorskip("av")
    with pytest.raises(OneVisionError, match=words):
        load_video(source)


def test_without_pyav_the_message_says_what_to_install(mp4, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(OneVisionError, match=r"pip install 'onevision-edge\[video\]'"):
        load_video(mp4)


# ---------------------------------------------------------------- frames as images


def pictures(count=12, size=(40, 30)):
    return [Image.new("RGB", size, (20 * index, 0, 0)) for index in range(count)]


def reds(frames):
    return [frame.getpixel((0, 0))[0] // 20 for frame in frames]


def test_a_list_is_the_frames(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # no PyAV is needed
    assert reds(load_video(pictures())) == list(range(12))
    assert reds(load_video(tuple(pictures()), frames=3)) == [0, 6, 11]
    assert reds(load_video(np.stack([np.asarray(picture) for picture in pictures()]))) == list(range(12))
    with pytest.raises(OneVisionError, match="no frame rate"):
        load_video(pictures(), fps=2)


def test_a_directory_is_read_in_natural_order(tmp_path):
    for index, picture in enumerate(pictures()):
        picture.save(tmp_path / f"Frame{index}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / "._Frame0.png").write_bytes(b"left by a file manager")
    assert reds(load_video(tmp_path)) == list(range(12))
    assert reds(load_video(str(tmp_path), frames=3)) == [0, 6, 11]
    (tmp_path / "Frame3.png").write_bytes(b"broken")
    with pytest.raises(OneVisionError, match=r"frame 4 of 12 \(.*Frame3\.png\): not an image"):
        load_video(tmp_path)


def test_an_empty_directory(tmp_path):
    with pytest.raises(OneVisionError, match="holds no image files"):
        load_video(tmp_path)


def test_frames_of_different_sizes():
    mixed = [*pictures(2), Image.new("RGB", (41, 30))]
    with pytest.raises(OneVisionError, match="frame 3 is 41 x 30 pixels but frame 1 is 40 x 30"):
        load_video(mixed)


def test_too_many_pixels(monkeypatch):
    monkeypatch.setattr(video_module, "MAX_VIDEO_PIXELS", 5 * 40 * 30)
    assert len(load_video(pictures(5))) == 5
    with pytest.raises(OneVisionError, match="6 frames of 40 x 30 pixels are over the limit of 6,000"):
        load_video(pictures(6))


def test_from_file_to_pixel_rows(mp4):
    values, grid = ImageProcessor().video(load_video(mp4, frames=5))
    assert grid.tolist() == [[5, 4, 6]]
    assert values.shape == (5 * 4 * 6, 588)
    assert values.dtype == np.float32
