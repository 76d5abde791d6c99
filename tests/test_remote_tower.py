"""The tower of a checkpoint's own modeling code, against the official code's recorded outputs and against numpy."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_rows import Recorder, error, image_row, numpy_model, row_of, two_images
from remote_checkpoint import MODELING, RIGHT_OFFSETS, add_code

from onevision_edge.errors import OneVisionError
from onevision_edge.report.parity.probe import MERGER, PATCH_EMBED, STITCHED, block_stage, layer_stage
from onevision_edge.report.parity.transformers_side import TransformersSide, open_transformers
from onevision_edge.runtime.images import patch_positions

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'onevision-edge[reference]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'onevision-edge[reference]'")


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Modeling code is copied to a folder of these tests, and imported from there."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", list(sys.path))
        yield


@pytest.fixture
def remote(tiny: Callable[..., Any], tmp_path: Path) -> TransformersSide:
    directory = add_code(tiny().write(tmp_path / "remote"))
    return open_transformers(directory, trust_remote_code=True, threads=1)


def test_vision_stages_of_the_official_code(
    golden_checkpoint: Path, golden: Callable[[str], Any], tmp_path: Path
) -> None:
    case = golden("a_single_image")
    side = open_transformers(copied(golden_checkpoint, tmp_path), trust_remote_code=True, threads=1)
    probe = Recorder()
    side.trace(row_of(case), probe)
    blocks = [block_stage(i) for i in range(3)]
    assert probe.order == [PATCH_EMBED, *blocks, MERGER, STITCHED, *(layer_stage(i) for i in range(3))]
    assert error(probe.read[PATCH_EMBED][0], case.pixels("pixel_values")) == 0
    assert error(probe.gave[PATCH_EMBED][0], case.arrays["vis__pre_layernorm"]) < 1e-5
    assert error(probe.gave[blocks[0]][0], case.arrays["vis__block0"]) < 1e-5
    assert error(probe.gave[blocks[2]][0], case.arrays["vis__block_last"]) < 1e-5
    assert error(probe.gave[MERGER][0], case.arrays["image_embeds"]) < 1e-5
    assert error(side.logits(row_of(case), np.arange(48)), case.arrays["logits"][0]) < 1e-4


@pytest.mark.parametrize(("name", "kind"), [("b_two_images", "image"), ("d_video", "video")])
def test_segments_are_run_alone(
    golden_checkpoint: Path, golden: Callable[[str], Any], tmp_path: Path, name: str, kind: str
) -> None:
    case = golden(name)
    side = open_transformers(copied(golden_checkpoint, tmp_path), trust_remote_code=True, threads=1)
    assert side.tower is not None
    assert any("rows of each after the first too early" in note for note in side.subject.notes)
    assert error(side.media(row_of(case)), case.arrays[f"{kind}_embeds"]) < 1e-5
    pixels = case.inputs["pixel_values_videos" if kind == "video" else "pixel_values"]
    verbatim = side.tower.verbatim(pixels, case.inputs[f"{kind}_grid_thw"])
    assert error(verbatim, case.arrays[f"verbatim__{kind}_embeds"]) < 1e-5
    assert error(verbatim, case.arrays[f"{kind}_embeds"]) > 1


def test_code_that_gathers_rightly_is_not_accused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    directory = add_code(tiny().write(tmp_path / "right"), offsets=RIGHT_OFFSETS)
    side = open_transformers(directory, trust_remote_code=True, threads=1)
    assert side.tower is not None
    assert not any("too early" in note for note in side.subject.notes)
    row = two_images()
    assert row.pixel_values is not None
    assert row.image_grid_thw is not None
    assert error(side.tower.verbatim(row.pixel_values, row.image_grid_thw), side.media(row)) < 1e-5


def test_the_tower_against_numpy(remote: TransformersSide, tiny: Callable[..., Any]) -> None:
    model, row = numpy_model(remote.config, tiny()), two_images()
    assert row.pixel_values is not None
    parts = (row.pixel_values[:8], (2, 4)), (row.pixel_values[8:], (4, 4))
    expected = np.concatenate([model.tower(pixels, patch_positions(*size, 2)) for pixels, size in parts])
    assert error(remote.media(row), expected) < 2e-5
    assert set(remote.subject.files) == {"config.json", "model.safetensors", "modeling_remote.py"}


@pytest.mark.parametrize("stage", [PATCH_EMBED, block_stage(0), block_stage(1), MERGER])
def test_a_vision_stage_runs_on_what_the_probe_gives(remote: TransformersSide, stage: str) -> None:
    first, second = Recorder(), Recorder()
    remote.trace(image_row(seed=1), first)
    remote.trace(image_row(seed=2), second)
    assert len(first.read[stage][0]) == (16 if stage == PATCH_EMBED else 17)
    mixed = Recorder(**{stage: first.read[stage][0]})
    remote.trace(image_row(seed=2), mixed)
    assert error(mixed.gave[stage][0], first.gave[stage][0]) == 0
    assert error(mixed.gave[STITCHED][0], first.gave[STITCHED][0]) == 0
    assert error(second.gave[stage][0], first.gave[stage][0]) > 0.1


def test_bf16_of_the_tower(remote: TransformersSide, tmp_path: Path) -> None:
    half = open_transformers(tmp_path / "remote", trust_remote_code=True, dtype="bf16", threads=1)
    assert half.tower is not None
    dtypes = {name: value.dtype for name, value in half.tower.module.named_parameters()}
    assert dtypes.pop("class_pos_emb") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    exact, rounded = remote.media(two_images()), half.media(two_images())
    assert 1e-3 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.05


def test_untrusted_code_is_not_imported(tiny: Callable[..., Any], tmp_path: Path) -> None:
    marker = tmp_path / "imported"
    code = f"open({str(marker)!r}, 'w').close()\n" + MODELING
    directory = add_code(tiny().write(tmp_path / "marked"), code)
    open_transformers(directory, threads=1)
    assert not marker.exists()
    open_transformers(directory, trust_remote_code=True, threads=1)
    assert marker.exists()


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("from transformers.cache_utils import SlidingWindow2Cache\n" + MODELING, "cannot import name"),
        (MODELING.replace("self.visual", "self.tower"), "no module of the name visual"),
        (MODELING.replace("super().__init__(config)", "raise KeyError('default')"), "default"),
        (MODELING.replace("grid_thw.tolist()", "grid_thw.no_such()"), "no_such"),
    ],
)
def test_code_that_does_not_work(tiny: Callable[..., Any], tmp_path: Path, code: str, what: str) -> None:
    directory = add_code(tiny().write(tmp_path / "broken"), code)
    with pytest.raises(OneVisionError, match=r"does not work with transformers \d+\.\d+.*pip install") as raised:
        open_transformers(directory, trust_remote_code=True, threads=1)
    assert what in str(raised.value)


def test_code_that_is_not_there(tiny: Callable[..., Any], tmp_path: Path) -> None:
    directory = tiny().write(tmp_path / "c")
    with pytest.raises(OneVisionError, match=r"maps no model class to modeling code"):
        open_transformers(directory, trust_remote_code=True)
    (add_code(directory) / "modeling_remote.py").unlink()
    with pytest.raises(OneVisionError, match=r"modeling_remote.py is not here"):
        open_transformers(directory, trust_remote_code=True)


def test_what_the_code_prints_is_no_result(
    tiny: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = add_code(tiny().write(tmp_path / "loud"), "print('loud')\n" + MODELING)
    open_transformers(directory, trust_remote_code=True, threads=1)
    out, err = capfd.readouterr()
    assert "loud" not in out
    assert "loud" in err


def copied(golden_checkpoint: Path, tmp_path: Path) -> Path:
    """The recorded checkpoint, with modeling code."""
    directory = tmp_path / "golden"
    directory.mkdir()
    for path in golden_checkpoint.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return add_code(directory)
