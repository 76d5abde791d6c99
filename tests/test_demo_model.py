"""The shipped model sees: its answers on held-out scenes, through exported bundles. About half a minute."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import onevision_edge

ROOT = Path(onevision_edge.__file__).parent


@pytest.fixture(scope="module")
def benchmark(script: Callable[[str], ModuleType]) -> ModuleType:
    """benchmarks/demo_accuracy.py, which asks the questions."""
    return script("benchmarks/demo_accuracy.py")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_exact_answers_on_held_out_scenes(benchmark: ModuleType, dtype: str, tmp_path: Path) -> None:
    onevision_edge.export("demo", tmp_path / "bundle", dtype=dtype)
    right, asked = benchmark.accuracy(onevision_edge.load(tmp_path / "bundle"))
    assert asked.total() >= 300
    assert right.total() / asked.total() >= 0.95, {kind: (right[kind], asked[kind]) for kind in asked}


def test_blank_images_do_not_answer_the_questions(benchmark: ModuleType, tmp_path: Path) -> None:
    """The questions alone give few answers away: with every pixel grey the model must fail most."""
    from PIL import Image

    onevision_edge.export("demo", tmp_path / "bundle", dtype="fp32")
    model = onevision_edge.load(tmp_path / "bundle")
    rows = benchmark.questions()[::6]
    blind = [{**row, "images": [Image.new("RGB", (224, 224), (128, 128, 128)) for _ in row["images"]]} for row in rows]
    right = sum(benchmark.ask(model, row) == row["answer"] for row in blind)
    assert right / len(rows) < 0.35


def test_the_checkpoint_is_small_and_whole() -> None:
    shipped = sum(path.stat().st_size for path in (ROOT / "demo" / "checkpoint").iterdir())
    assert shipped <= 8_000_000
    names = {path.name for path in (ROOT / "demo" / "checkpoint").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"}
