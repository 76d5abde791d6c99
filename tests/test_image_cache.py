"""Images that were seen before do not go through the tower again."""

import base64
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import onevision_edge
from onevision_edge.errors import OneVisionError
from onevision_edge.runtime import image_reading, images
from onevision_edge.runtime.image_cache import ImageCache, image_digest
from onevision_edge.runtime.images import ImageProcessor
from onevision_edge.runtime.model import Model

IMAGE = 505


def picture(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pixel rows and grid of one random image of height x width patches."""
    rows = np.random.default_rng(seed).standard_normal((height * width, 588))
    return rows.astype(np.float32), np.array([[1, height, width]])


def together(*pictures: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([rows for rows, _ in pictures]), np.concatenate([grid for _, grid in pictures])


def counted(model: Model) -> list[tuple[int, ...]]:
    """The shapes of pixel inputs that the tower runs on from now on."""
    shapes: list[tuple[int, ...]] = []
    graph: Any = model._graphs["vision"]
    run = type(graph).run

    def noting(inputs: Any) -> Any:
        shapes.append(inputs["pixel_values"].shape)
        return run(graph, inputs)

    graph.run = noting
    return shapes


@pytest.fixture
def model(golden_bundle: Callable[[str], Path]) -> Model:
    return onevision_edge.load(golden_bundle("fp32"), threads=1)


def rows(value: float, count: int = 4) -> np.ndarray:
    return np.full((count, 8), value, np.float32)


def test_what_was_wanted_last_is_kept() -> None:
    cache = ImageCache(3 * rows(0).nbytes)
    for name in (b"a", b"b", b"c"):
        cache.put(name, rows(ord(name)))
    assert cache.get(b"a") is not None
    cache.put(b"d", rows(4))
    assert cache.get(b"b") is None
    assert (cache.get(b"a") == ord("a")).all()
    assert (len(cache), cache.nbytes) == (3, 3 * rows(0).nbytes)


def test_the_budget_holds_whatever_comes() -> None:
    cache, random = ImageCache(1000), np.random.default_rng(0)
    for _ in range(300):
        cache.put(bytes([random.integers(20)]), rows(1, int(random.integers(1, 40))))
        assert cache.nbytes == sum(kept.nbytes for kept in cache._rows.values()) <= 1000
    cache.put(b"large", rows(1, 40))
    assert cache.get(b"large") is None
    nothing = ImageCache(0)
    nothing.put(b"a", rows(1))
    assert (len(nothing), nothing.nbytes) == (0, 0)


def test_digests_tell_pixels_and_sizes_apart() -> None:
    pixels, _ = picture(4, 4)
    changed = pixels.copy()
    changed[-1, -1] += 1e-6
    digests = {image_digest(pixels, (4, 4)), image_digest(pixels, (2, 8)), image_digest(changed, (4, 4))}
    assert len(digests) == 3
    assert {len(digest) for digest in digests} == {16}
    assert image_digest(pixels.copy(), (4, 4)) in digests


def test_a_known_image_is_not_encoded(model: Model) -> None:
    shapes, (one, other, third) = counted(model), (picture(4, 6), picture(4, 6, 1), picture(2, 4, 2))
    first = model.encode_images(*together(one, other))
    assert shapes == [(2, 24, 588)]
    found = model.encode_images(*together(third, other, one))
    assert shapes == [(2, 24, 588), (1, 8, 588)]
    np.testing.assert_array_equal(found[2:], np.concatenate([first[6:], first[:6]]))


def test_equal_images_of_a_call_are_encoded_once(model: Model) -> None:
    shapes, one = counted(model), picture(4, 4)
    found = model.encode_images(*together(one, picture(2, 2, 1), one))
    assert sorted(shapes) == [(1, 4, 588), (1, 16, 588)]
    np.testing.assert_array_equal(found[:4], found[5:])


def test_frames_are_images(model: Model) -> None:
    frames = [picture(4, 4, seed)[0] for seed in range(3)]
    model.encode_images(frames[1], np.array([[1, 4, 4]]))
    shapes = counted(model)
    model.encode_images(np.concatenate(frames), np.array([[3, 4, 4]]))
    assert shapes == [(2, 16, 588)]


def test_embeddings_that_were_returned_are_the_caller_s_own(model: Model) -> None:
    one = picture(4, 4)
    first = model.encode_images(*one)
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(model.encode_images(*one), kept)


def test_without_a_cache_every_image_is_encoded(golden_bundle: Callable[[str], Path]) -> None:
    model = onevision_edge.load(golden_bundle("fp32"), threads=1, image_cache=0)
    shapes, one = counted(model), picture(4, 4)
    first, second = model.encode_images(*one), model.encode_images(*one)
    assert len(shapes) == 2
    np.testing.assert_array_equal(first, second)


def test_tokens_are_the_same(model: Model, golden_bundle: Callable[[str], Path]) -> None:
    """With both images known, one of them, and none."""
    plain = onevision_edge.load(golden_bundle("fp32"), threads=1, image_cache=0, prefix_caches=0)
    ids = np.array([1, 2, *[IMAGE] * 6, 3, *[IMAGE] * 4, 4, 5])
    for seeds in ((0, 1), (0, 2), (3, 1), (0, 1), (2, 0)):
        pixels, grid = together(picture(4, 6, seeds[0]), picture(4, 4, seeds[1]))
        answers = [m.generate_ids(ids, pixels, grid, max_tokens=12, eos_token_id=[]).tolist() for m in (model, plain)]
        assert answers[0] == answers[1]


# Files that were decoded before.


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sources that are decoded from now on."""
    sources: list[Any] = []

    def noting(source: Any, **options: Any) -> Image.Image:
        sources.append(source)
        return image_reading.load_image(source, **options)

    monkeypatch.setattr(images, "load_image", noting)
    return sources


def written(path: Path, seed: int = 0, size: tuple[int, int] = (90, 60)) -> Path:
    codes = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(codes).save(path)
    return path


def test_a_known_file_is_not_decoded(tmp_path: Path, opened: list[Any]) -> None:
    """By its bytes, whatever they are called; the rows are the same as without."""
    cache, processor = ImageCache(10**7), ImageProcessor()
    path, other = written(tmp_path / "a.png"), written(tmp_path / "b.png", 1, (30, 200))
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    expected = processor([path, other])
    opened.clear()
    for sources in ([path, other], [str(path), other.read_bytes()], [url, str(other)]):
        found = processor(sources, cache)
        for one, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, wanted)
    assert opened == [path, other]


def test_other_bytes_and_other_settings_are_decoded(tmp_path: Path, opened: list[Any]) -> None:
    cache, processor = ImageCache(10**7), ImageProcessor()
    path = written(tmp_path / "a.png")
    first = processor(path, cache)
    assert processor.with_pixels(max_pixels=56 * 56)(path, cache)[1].prod() <= 16
    written(path, 2)
    assert (processor(path, cache)[0] != first[0]).any()
    assert len(opened) == 3
    processor(path, ImageCache(0))
    processor(np.zeros((60, 60, 3), np.uint8), cache)
    processor(Image.new("RGB", (60, 60)), cache)
    assert len(opened) == 6


def test_what_cannot_be_read_is_named_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, processor = ImageCache(10**7), ImageProcessor()
    (tmp_path / "bad.png").write_bytes(b"no image")
    os.mkfifo(tmp_path / "pipe.png")
    sources = (tmp_path / "none.png", tmp_path / "bad.png", tmp_path / "pipe.png", tmp_path, b"", "https://a.b/c.png")
    for source in sources:
        messages = []
        for known in (None, cache):
            with pytest.raises(OneVisionError) as caught:
                processor([source], known)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    assert len(cache) == 0
    monkeypatch.setattr(image_reading, "_MAX_DIGESTED", 100)
    processor(written(tmp_path / "large.png"), cache)
    assert len(cache) == 0
