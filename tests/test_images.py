import base64
import io
import math
import random
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote_from_bytes

import numpy as np
import PIL
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from onevision_edge.errors import OneVisionError
from onevision_edge.runtime.image_reading import MAX_DECODED_PIXELS
from onevision_edge.runtime.images import ImageProcessor, load_image, patch_positions, preprocess_images

PILLOW = int(PIL.__version__.partition(".")[0])
DATA = Path(__file__).parent / "data"
PROCESSOR_CASES = sorted(path.stem for path in (DATA / "processor").glob("*.npz"))
GOLDEN_CASES = [
    "a_single_image",
    "b_two_images",
    "e_batch2_leftpad",
    "f_resized_maxpixels",
    "g_resized_to_factor",
]


def decoded(codes, table):
    """float32 rows from the stored uint8 codes and the table of each channel's values."""
    channel = np.repeat(np.arange(3), codes.shape[1] // 3)
    return table[channel[None], codes]


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def scene(width=60, height=40):
    rng = np.random.default_rng(7)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(width, height, depth, colour, rows):
    """A PNG from its raw scan lines (without filter bytes), for the kinds Pillow does not write."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    lines = b"".join(b"\0" + row for row in rows)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def refusal(source):
    """What preprocessing says against the source; None when it takes it."""
    try:
        preprocess_images(source)
    except OneVisionError as error:
        return str(error)
    return None


def levels(source):
    return np.asarray(load_image(source))


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("case", PROCESSOR_CASES)
def test_bit_exact_with_the_pil_processor(case):
    stored = np.load(DATA / "processor" / f"{case}.npz")
    limit = 100_352 if "maxpixels" in case else None
    values, grid = preprocess_images([DATA / "processor" / f"{case}.png"], max_pixels=limit)
    assert values.dtype == np.float32
    assert grid.dtype == np.int64
    np.testing.assert_array_equal(grid, stored["image_grid_thw"])
    expected = decoded(stored["slow__u8"], stored["slow_lut"])
    if case.startswith("p4_") and PILLOW < 13:
        # Since 13, Pillow resizes vertically first where the height shrinks much more than the width.
        assert np.abs(values - expected).max() < 1.01 / 255 / 0.26
    else:
        np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_bit_exact_with_the_model_goldens(case):
    stored = np.load(DATA / "golden" / f"{case}.npz")
    limit = 31_360 if "maxpixels" in case else None
    images = sorted((DATA / "golden" / "images").glob(f"{case}_*.png"))
    values, grid = preprocess_images(images, max_pixels=limit)
    np.testing.assert_array_equal(grid, stored["image_grid_thw"])
    np.testing.assert_array_equal(values, decoded(stored["pixel_values__u8"], stored["pixel_lut"]))


def test_video_is_bit_exact_with_the_model_golden():
    stored = np.load(DATA / "golden" / "d_video.npz")
    frames = sorted((DATA / "golden" / "images").glob("d_video_*.png"))
    values, grid = ImageProcessor().video(frames)
    assert grid.tolist() == [[3, 6, 8]]
    assert grid.dtype == np.int64
    np.testing.assert_array_equal(values, decoded(stored["pixel_values_videos__u8"], stored["pixel_lut"]))


@pytest.mark.parametrize(("patch", "merge"), [(14, 2), (4, 3), (16, 1)])
def test_patch_order_against_a_loop(patch, merge):
    side = patch * merge
    image = scene(3 * side, 2 * side)
    plain = {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3, "rescale_factor": 1.0}
    processor = ImageProcessor(patch_size=patch, merge_size=merge, min_pixels=1, **plain)
    values, grid = processor(image)
    pixels = np.asarray(image)
    rows, positions = [], []
    for block_row in range(2):
        for block_column in range(3):
            for row in range(block_row * merge, (block_row + 1) * merge):
                for column in range(block_column * merge, (block_column + 1) * merge):
                    tile = pixels[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                    rows.append(np.concatenate([tile[..., channel].ravel() for channel in range(3)]))
                    positions.append((row, column))
    assert grid.tolist() == [[1, 2 * merge, 3 * merge]]
    np.testing.assert_array_equal(values, np.stack(rows))
    np.testing.assert_array_equal(patch_positions(2 * merge, 3 * merge, merge), positions)


def test_patch_positions_refuses_a_grid_that_does_not_divide():
    assert patch_positions(4, 6, 2).dtype == np.int64
    with pytest.raises(OneVisionError, match="3 x 4 grid"):
        patch_positions(3, 4, 2)


def test_several_images_are_their_single_results_in_a_row():
    images = [scene(60, 40), scene(90, 200)]
    values, grid = preprocess_images(images)
    singles = [preprocess_images(image) for image in images]
    np.testing.assert_array_equal(values, np.concatenate([rows for rows, _ in singles]))
    np.testing.assert_array_equal(grid, np.concatenate([one for _, one in singles]))
    assert grid.prod(axis=1).sum() == len(values)


# ---------------------------------------------------------------- resizing

sides = st.integers(1, 5000)


def nearest_multiple(value, factor):
    """The multiple of factor nearest to value, the even one of two equally near."""
    below = value // factor
    twice = 2 * (value - below * factor)
    return (below + (twice > factor or (twice == factor and below % 2))) * factor


@given(height=sides, width=sides, merge=st.integers(1, 3), least=st.integers(1, 400_000), room=st.floats(1, 50))
def test_resized_properties(height, width, merge, least, room):
    processor = ImageProcessor(merge_size=merge, min_pixels=least, max_pixels=int(least * room))
    factor = processor.factor
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(OneVisionError, match="aspect"):
            processor.resized(height, width)
        return
    new_height, new_width = processor.resized(height, width)
    assert new_height % factor == new_width % factor == 0
    assert min(new_height, new_width) >= factor
    near = nearest_multiple(height, factor), nearest_multiple(width, factor)
    area = near[0] * near[1]
    if least <= area <= processor.max_pixels:
        assert (new_height, new_width) == near
    elif area < least:
        ratio = math.sqrt(least / (height * width))
        assert new_height * new_width >= least * (1 - 1e-12)
        assert 0 <= new_height - height * ratio * (1 - 1e-12) <= factor * (1 + 1e-9)
        assert 0 <= new_width - width * ratio * (1 - 1e-12) <= factor * (1 + 1e-9)
    elif min(new_height, new_width) > factor:
        assert new_height * new_width <= processor.max_pixels * (1 + 1e-12)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((98, 126), (112, 112)),  # 3.5 and 4.5 tokens both go to 4
        ((9, 13), (56, 84)),
        ((333, 251), (336, 252)),
        ((4000, 3000), (1820, 1372)),
        ((1, 200), (28, 812)),
        ((10, 2000), (28, 812)),
    ],
)
def test_resized_values(size, expected):
    assert ImageProcessor().resized(*size) == expected


def test_one_by_ten_thousand_is_refused():
    with pytest.raises(OneVisionError, match=r"^image 2 of 2: 10000 pixels high and 1 wide .* 200"):
        preprocess_images([scene(), np.zeros((10_000, 1), np.uint8)])
    with pytest.raises(OneVisionError, match="empty"):
        ImageProcessor().resized(0, 5)


# ---------------------------------------------------------------- settings


def test_from_config_reads_the_published_file():
    config = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.25, 0.125],
        "image_std": [0.5, 0.5, 0.25],
        "image_processor_type": "Qwen2VLImageProcessor",
        "max_pixels": 2_560_000,
        "merge_size": 2,
        "min_pixels": 3136,
        "patch_size": 14,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 1, "longest_edge": 12_845_056},
        "temporal_patch_size": 2,
    }
    processor = ImageProcessor.from_config(config)
    assert processor == ImageProcessor(image_mean=(0.5, 0.25, 0.125), image_std=(0.5, 0.5, 0.25))
    assert ImageProcessor.from_config({}) == ImageProcessor()


def test_from_config_limits_from_size():
    sized = ImageProcessor.from_config({"size": {"shortest_edge": 784, "longest_edge": 7840}, "max_pixels": None})
    assert (sized.min_pixels, sized.max_pixels) == (784, 7840)
    mixed = ImageProcessor.from_config({"size": {"shortest_edge": 784, "longest_edge": 7}, "max_pixels": 9000})
    assert (mixed.min_pixels, mixed.max_pixels) == (784, 9000)


def test_steps_that_are_off():
    image = np.full((56, 56, 3), 51, np.uint8)
    scaled, _ = ImageProcessor.from_config({"do_normalize": False})(image)
    raw, _ = ImageProcessor.from_config({"do_normalize": False, "do_rescale": False})(image)
    assert np.unique(scaled) == np.float32(0.2)
    assert np.unique(raw) == 51


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"patch_size": "14"}, "patch_size"),
        ({"merge_size": 0}, "merge_size"),
        ({"min_pixels": 1.5}, "min_pixels"),
        ({"max_pixels": True}, "max_pixels"),
        ({"max_pixels": 100}, "min_pixels 3136 is above max_pixels 100"),
        ({"min_pixels": 10**12, "max_pixels": 10**12}, "min_pixels"),
        ({"patch_size": 10**400}, "patch_size"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.5, "x"]}, "image_std"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std"),
        ({"rescale_factor": float("nan")}, "rescale_factor"),
        ({"resample": 9}, "resample"),
        ({"size": 336}, "size"),
        ({"size": {"height": 336, "width": 336}}, "size"),
        ({"size": {"shortest_edge": "a"}}, "size.shortest_edge"),
        ({"do_resize": False}, "do_resize"),
        ({"do_rescale": "no"}, "do_rescale"),
        ({"do_center_crop": True}, "do_center_crop"),
        (["patch_size"], "JSON object"),
    ],
)
def test_from_config_names_the_wrong_field(config, field):
    with pytest.raises(OneVisionError, match=field):
        ImageProcessor.from_config(config)


def test_with_pixels():
    processor = ImageProcessor().with_pixels(max_pixels=50_000)
    assert (processor.min_pixels, processor.max_pixels) == (3136, 50_000)
    assert processor.with_pixels(min_pixels=60_000).max_pixels == 60_000
    assert processor.with_pixels(max_pixels=900).min_pixels == 900
    with pytest.raises(OneVisionError, match="min_pixels 60000 is above max_pixels 50000"):
        processor.with_pixels(min_pixels=60_000, max_pixels=50_000)
    with pytest.raises(OneVisionError, match="max_pixels must be a positive"):
        processor.with_pixels(max_pixels="many")
    with pytest.raises(OneVisionError, match="max_pixels must be a positive"):
        processor.with_pixels(max_pixels=-1)


# ---------------------------------------------------------------- kinds of source


def test_every_spelling_of_one_image_is_the_same(tmp_path):
    image = scene()
    data = saved(image, "PNG")
    path = tmp_path / "a b%.png"
    path.write_bytes(data)
    encoded = base64.b64encode(data).decode()
    spellings = [
        image,
        np.asarray(image),
        np.asarray(image).astype(np.float32) / 255,
        np.asarray(image).astype(np.float64) / 255,
        np.asarray(image).astype(np.uint16) * 257,
        np.asarray(image)[:, ::-1][:, ::-1],
        data,
        bytearray(data),
        path,
        str(path),
        path.as_uri(),
        f"data:image/png;base64,{encoded}",
        f"DATA:image/png;charset=x;base64,{encoded.rstrip('=')[:40]}\n{encoded.rstrip('=')[40:]}",
        f"data:image/png;base64,{encoded.replace('+', '%2B')}",
        f"data:image/png,{quote_from_bytes(data)}",
    ]
    for spelling in spellings:
        result = load_image(spelling)
        assert result.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(result), np.asarray(image))
    assert preprocess_images(str(path))[1].tolist() == preprocess_images((path,))[1].tolist()


def test_grey_arrays():
    grey = np.arange(60 * 40, dtype=np.uint16).reshape(40, 60) * 27
    expected = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(levels(grey), expected)
    np.testing.assert_array_equal(levels(grey[..., None]), expected)
    np.testing.assert_array_equal(levels(grey > 30_000)[..., 0], np.where(grey > 30_000, 255, 0))
    veiled = np.stack([np.full((4, 4), 100), np.full((4, 4), 0)], axis=-1).astype(np.uint8)
    assert np.unique(levels(veiled)).tolist() == [255]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 40, 60), np.uint8), r"transpose\(1, 2, 0\)"),
        (np.zeros((40, 60, 7), np.uint8), "7 channels"),
        (np.zeros((0, 60, 3), np.uint8), "empty"),
        (np.zeros((40, 60, 0), np.uint8), "empty"),
        (np.zeros(5, np.uint8), r"not \[5\]"),
        (np.zeros((1, 2, 3, 3), np.uint8), "must be"),
        (np.zeros((40, 60, 3), np.int64), "int64"),
        (np.zeros((40, 60), complex), "complex128"),
        (np.zeros((40, 60), object), "object"),
        (np.full((40, 60, 3), 255.0), "0 to 1, these go from 255 to 255"),
        (np.full((40, 60, 3), np.nan), "0 to 1"),
        (np.full((40, 60, 3), -0.5), "0 to 1"),
    ],
)
def test_arrays_refused(array, words):
    with pytest.raises(OneVisionError, match=f"^image 1 of 2: .*{words}"):
        preprocess_images([array, scene()])


@pytest.mark.parametrize("source", [None, 5, object()])
def test_not_an_image_at_all(source):
    with pytest.raises(OneVisionError, match=type(source).__name__):
        preprocess_images(source)
    with pytest.raises(OneVisionError, match=f"image 2 of 2: a {type(source).__name__}"):
        preprocess_images([scene(), source])


def test_no_image():
    with pytest.raises(OneVisionError, match="no image"):
        preprocess_images([])


# ---------------------------------------------------------------- modes and formats


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "PPM", "WEBP", "GIF", "JPEG"])
def test_formats(format):
    image = scene().quantize(16).convert("RGB")
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(image, format, **options)
    with Image.open(io.BytesIO(data)) as again:
        np.testing.assert_array_equal(levels(data), np.asarray(again.convert("RGB")))
    if format != "JPEG":
        np.testing.assert_array_equal(levels(data), np.asarray(image))


@pytest.mark.parametrize(("mode", "format"), [("RGBA", "PNG"), ("RGBA", "WEBP"), ("LA", "PNG"), ("RGBA", "TIFF")])
def test_transparency_lies_on_white(mode, format):
    alpha = Image.fromarray(np.tile(np.arange(60, dtype=np.uint8) * 4, (40, 1)))
    image = scene().convert(mode)
    image.putalpha(alpha)
    data = saved(image, format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
    colour, cover = (
        np.asarray(image.convert("RGBA"))[..., :3].astype(float),
        np.asarray(alpha)[..., None] / 255,
    )
    expected = colour * cover + 255 * (1 - cover)
    assert np.abs(levels(data) - expected).max() <= 1
    assert (levels(data)[:, 0] == 255).all()
    assert np.abs(levels(image) - expected).max() <= 1


def test_palette_with_transparency_and_colour_key():
    palette = Image.new("P", (4, 2))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1, 0, 1, 1, 1, 1, 1])
    expected = [[255, 255, 255], [200, 100, 50], [255, 255, 255], [200, 100, 50]]
    assert levels(saved(palette, "PNG", transparency=0))[0].tolist() == expected
    keyed = saved(palette.convert("RGB"), "PNG", transparency=(10, 20, 30))
    assert levels(keyed)[0].tolist() == expected
    assert levels(saved(palette, "PNG"))[0, 0].tolist() == [10, 20, 30]


def test_one_bit_and_palette_and_colour_spaces():
    assert np.unique(levels(saved(scene().convert("1"), "PNG"))).tolist() == [0, 255]
    for mode in ("YCbCr", "HSV", "CMYK", "L", "P"):
        image = scene().convert(mode)
        np.testing.assert_array_equal(levels(image), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_has_the_right_colours():
    red = Image.new("RGB", (32, 32), (255, 0, 0)).convert("CMYK")  # Pillow writes Adobe's inverted kind
    assert np.abs(levels(saved(red, "JPEG", quality=95)).astype(int) - [255, 0, 0]).max() <= 3
    assert np.abs(levels(saved(red, "TIFF")).astype(int) - [255, 0, 0]).max() == 0


def test_sixteen_bit_samples_are_scaled_not_clipped():
    ramp = np.linspace(0, 65_535, 60 * 40).astype(np.uint16).reshape(40, 60)
    high = np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, axis=2)
    grey = Image.fromarray(ramp)
    assert grey.mode == "I;16"
    sources = {
        "I;16": grey,
        "I": Image.fromarray(ramp.astype(np.int32)),
        "PNG": saved(grey, "PNG"),
        "TIFF": saved(grey, "TIFF"),
        "TIFF I;16B": saved(Image.frombytes("I;16B", (60, 40), ramp.astype(">u2").tobytes()), "TIFF"),
        "PGM": b"P5 60 40 65535\n" + ramp.astype(">u2").tobytes(),
        "RGB PNG": png(60, 40, 16, 2, [row.repeat(3).astype(">u2").tobytes() for row in ramp]),
    }
    for kind, source in sources.items():
        np.testing.assert_array_equal(levels(source), high, err_msg=kind)
    grey_alpha = png(60, 40, 16, 4, [np.stack([row, 0 * row], -1).astype(">u2").tobytes() for row in ramp])
    assert (levels(grey_alpha) == 255).all()


def test_deep_samples_of_unknown_range_are_refused():
    with pytest.raises(OneVisionError, match="32-bit samples, 0 to 70000"):
        load_image(Image.fromarray(np.array([[0, 70_000]], np.int32)))
    ramp = np.linspace(0, 1, 2400, dtype=np.float32).reshape(40, 60)
    np.testing.assert_array_equal(levels(saved(Image.fromarray(ramp), "TIFF"))[..., 0], np.rint(ramp * 255))
    with pytest.raises(OneVisionError, match="0 to 1, these go from 0 to 300"):
        load_image(saved(Image.fromarray(ramp * 300), "TIFF"))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert np.unique(levels(data).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(scene(), format, exif=exif, **({"quality": 95} if format == "JPEG" else {}))
    with Image.open(io.BytesIO(data)) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    upright = load_image(data)
    assert upright.size == ((60, 40) if orientation < 5 else (40, 60))
    np.testing.assert_array_equal(np.asarray(upright), expected)
    np.testing.assert_array_equal(levels(upright), expected)  # not turned a second time
    with Image.open(io.BytesIO(data)) as lazy:
        np.testing.assert_array_equal(levels(lazy), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_hide_the_picture():
    data = saved(scene(), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    np.testing.assert_array_equal(levels(data), np.asarray(scene()))


def test_huge_metadata():
    # A profile spread over several chunks of JPEG is read; one that unpacks to 2 MB out of a PNG is refused.
    assert load_image(saved(scene(), "JPEG", icc_profile=bytes(3_000_000))).size == (60, 40)
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 2_000_000, zip=True)
    for data in (saved(scene(), "PNG", pnginfo=info), saved(scene(), "PNG", icc_profile=bytes(2_000_000))):
        assert len(data) < 200_000
        with pytest.raises(OneVisionError, match=r"^image: cannot be decoded"):
            load_image(data)


# ---------------------------------------------------------------- hostile files


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
@pytest.mark.parametrize("part", [0.05, 0.3, 0.6, 0.9])
def test_truncated_files(format, part, tmp_path):
    data = saved(scene(200, 150), format)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(OneVisionError, match=r"^image 2 of 2 \(.*cut\.img\): ") as caught:
        preprocess_images([scene(), path])
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_damaged_bytes_give_an_image_or_the_one_error(format):
    rng = random.Random(3)
    data = saved(scene(), format)
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(rng.choice([1, 4, 30])):
            broken[rng.randrange(min(len(broken), rng.choice([60, 10**6])))] = rng.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert (refusal(bytes(broken)) or "image: ").startswith("image: ")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"", "no bytes"),
        (b"hello, world", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        ("data:image/png;base64,", "no bytes"),
        ("data:image/png;base64,####", "base64 is broken"),
        ("data:image/png;base64", "comma"),
        ("https://example.com/cat.png", "not fetched"),
        ("S3://bucket/cat.png", "not fetched"),
        ("nowhere/cat.png", "image nowhere/cat.png: no such file"),
        ("x" * 5000, "not a usable path"),
        ("a\0b", "image a\0b: "),
        ("/dev/zero", "device"),
        (".", "directory"),
    ],
)
def test_sources_refused(source, words):
    with pytest.raises(OneVisionError, match=words) as caught:
        load_image(source)
    assert len(str(caught.value)) < 400


def test_an_empty_file_is_named(tmp_path):
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(OneVisionError, match=r"empty\.png: the file is empty"):
        load_image(path)


def test_thirty_thousand_squared_is_refused_from_its_header():
    data = png(30_000, 30_000, 8, 2, [])  # without a single row: decoding it would say something else
    with pytest.raises(OneVisionError, match="image 2 of 2: 900,000,000 pixels are over the limit"):
        preprocess_images([scene(), data])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_is_our_own_and_does_not_touch_pillows():
    before = Image.MAX_IMAGE_PIXELS
    width = MAX_DECODED_PIXELS // 9000 + 1
    with pytest.raises(OneVisionError, match=f"{width * 9000:,} pixels are over the limit of 89,478,485"):
        load_image(png(width, 9000, 8, 0, []))
    assert before == Image.MAX_IMAGE_PIXELS


def test_pillows_warning_as_an_error_reads_the_same():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OneVisionError, match="100,000,000 pixels are over the limit"):
            load_image(png(10_000, 10_000, 8, 0, []))


def test_threads_agree():
    data = [saved(scene(90 + index, 70), "JPEG") for index in range(8)]
    expected = [preprocess_images(one)[0] for one in data]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda one: preprocess_images(one)[0], data))
    for result, want in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, want)


def test_the_source_image_is_left_as_it_was():
    image = scene()
    image.info["note"] = "mine"
    array = np.asarray(image).copy()
    preprocess_images([image, array])
    assert image.info == {"note": "mine"}
    np.testing.assert_array_equal(array, np.asarray(image))


def test_frames_of_a_video_share_a_size():
    with pytest.raises(OneVisionError, match="frame 3 is 61 x 40 pixels but frame 1 is 60 x 40"):
        ImageProcessor().video([scene(), scene(), scene(61)])
    with pytest.raises(OneVisionError, match="frame 2 of 2: not an image"):
        ImageProcessor().video([scene(), b"garbage"])


def test_imports_stay_light():
    code = "import sys, onevision_edge.runtime.images; print(sorted({'torch', 'av', 'onnx'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
