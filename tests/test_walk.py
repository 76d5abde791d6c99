"""The full-precision walk against the official code's recordings, stage by stage and at the scored positions."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onevision_edge.bundle import no_progress
from onevision_edge.calibration.dataset import Dataset, Preparer, load_dataset
from onevision_edge.calibration.head import Head
from onevision_edge.calibration.journal import Journal
from onevision_edge.calibration.recipe import Methods
from onevision_edge.calibration.walk import REFERENCE, Walk
from onevision_edge.errors import OneVisionError
from onevision_edge.export.checkpoint import Checkpoint
from onevision_edge.precision.plan import Plan, Rule, default_plan

CASES = ["b_two_images", "d_video", "c_text_only", "a_single_image", "f_resized_maxpixels"]
PADDED = "e_batch2_leftpad"  # two rows, the second without padding
LOGITS_BOUND, EMBEDS_BOUND = 1e-4, 5e-5  # as for the exported bundle


class Keeping(Journal):
    """A journal that keeps every stage's activations and values in memory, too."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "key")
        self.streams: dict[str, np.ndarray] = {}
        self.given: dict[str, np.ndarray] = {}

    def finish(
        self,
        stage: str,
        values: Mapping[str, np.ndarray],
        notes: Mapping[str, Any],
        stream: np.memmap | None = None,
    ) -> None:
        if stream is not None:
            self.streams[stage] = np.array(stream)
        self.given |= values
        super().finish(stage, values, notes, stream)


@pytest.fixture(scope="module")
def checkpoint(golden_checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(golden_checkpoint)


@pytest.fixture(scope="module")
def rows(
    checkpoint: Checkpoint, golden: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Dataset]:
    """The rows of a recorded case."""
    directory = tmp_path_factory.mktemp("rows")
    preparer = Preparer.from_directory(checkpoint.directory, checkpoint.config)

    def read(case: str) -> Dataset:
        np.savez(directory / f"{case}.npz", **golden(case).inputs)
        return load_dataset(directory / f"{case}.npz", preparer)

    return read


def walked(
    checkpoint: Checkpoint, datasets: list[tuple[Dataset, bool]], directory: Path, plan: Plan, **options: Any
) -> tuple[Walk, Keeping]:
    journal = Keeping(directory)
    methods = Methods(samples=16, **options)
    walk = Walk(checkpoint, plan, methods, datasets, journal, no_progress, threads=1)
    walk.run()
    return walk, journal


@pytest.fixture(scope="module")
def walk(
    checkpoint: Checkpoint, rows: Callable[[str], Dataset], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Walk, Keeping]:
    """Two cases calibrate under a plan that changes nothing; the rest, and one of the two again, are evaluated."""
    calibrating = [(rows(case), True) for case in (PADDED, "g_resized_to_factor")]
    evaluating = [(rows(case), False) for case in (*CASES, PADDED)]
    return walked(checkpoint, [*calibrating, *evaluating], tmp_path_factory.mktemp("walk"), default_plan("float"))


def recorded(golden: Callable[[str], Any], name: str) -> np.ndarray:
    """What was recorded of the evaluated rows' tokens, one after the other."""
    cases = [golden(case).arrays for case in (*CASES, PADDED)]
    return np.concatenate([arrays[name][arrays["attention_mask"].astype(bool)] for arrays in cases])


def evaluated(walk: Walk, stream: np.ndarray) -> np.ndarray:
    return np.concatenate([stream[p.rows] for p in walk.itinerary.prompts if not p.calibrating])


def test_the_cases_show_images_videos_and_text(walk: tuple[Walk, Keeping]) -> None:
    prompts = walk[0].itinerary.prompts
    assert [p.calibrating for p in prompts] == [True] * 3 + [False] * 7
    assert sum(len(p.media_places) == 0 for p in prompts) == 1
    segments = walk[0].itinerary.segments
    assert len({s.size for s in segments}) > 3
    assert len(segments) > len(prompts)


def test_image_embeddings(walk: tuple[Walk, Keeping], golden: Callable[[str], Any]) -> None:
    tokens = [s.tokens for s in walk[0].itinerary.segments if not s.calibrating]
    found = np.concatenate([walk[1].streams["visual.merger"][part] for part in tokens])
    wanted = [golden(case).arrays for case in (*CASES, PADDED)]
    embeds = [a[name] for a in wanted for name in ("image_embeds", "video_embeds") if name in a]
    assert np.abs(found - np.concatenate(embeds)).max() < EMBEDS_BOUND


@pytest.mark.parametrize("block", [0, 2])
def test_blocks_of_the_tower(walk: tuple[Walk, Keeping], golden: Callable[[str], Any], block: int) -> None:
    """Recorded for one image, class token first."""
    prompt = [p for p in walk[0].itinerary.prompts if not p.calibrating][CASES.index("a_single_image")]
    (segment,) = [s for s in walk[0].itinerary.segments if s.tokens == prompt.media]
    wanted = golden("a_single_image").arrays["vis__block0" if block == 0 else "vis__block_last"]
    found = walk[1].streams[f"visual.blocks.{block}"][segment.rows]
    assert np.abs(found - wanted).max() < EMBEDS_BOUND


@pytest.mark.parametrize(
    ("stage", "name"),
    [("embeddings", "inputs_embeds"), ("model.layers.0", "hidden_layer0"), ("model.layers.2", "hidden_last")],
)
def test_the_decoder_s_activations(
    walk: tuple[Walk, Keeping], golden: Callable[[str], Any], stage: str, name: str
) -> None:
    assert np.abs(evaluated(walk[0], walk[1].streams[stage]) - recorded(golden, name)).max() < LOGITS_BOUND


def test_logits_of_every_token(walk: tuple[Walk, Keeping], golden: Callable[[str], Any]) -> None:
    """Of the rows that calibrate, too: none is treated as another."""
    head = Head(walk[0].checkpoint, walk[0].plan, Methods(), 0)
    stream, wanted = walk[1].streams["model.layers.2"], recorded(golden, "logits")
    out = np.empty((len(stream), wanted.shape[1]), np.float32)
    head.exact_logits(stream, out)
    assert np.abs(evaluated(walk[0], out) - wanted).max() < LOGITS_BOUND
    again = golden(PADDED).arrays
    first = out[: int(again["attention_mask"].sum())]
    assert np.abs(first - again["logits"][again["attention_mask"].astype(bool)]).max() < LOGITS_BOUND


def test_reference_logits_at_the_scored_positions(walk: tuple[Walk, Keeping], golden: Callable[[str], Any]) -> None:
    reference, start = np.load(walk[1].path(REFERENCE)), 0
    media = (walk[0].config.image_token_id, walk[0].config.video_token_id)
    wanted = []
    for case in (*CASES, PADDED):
        arrays = golden(case).arrays
        for ids, mask, logits in zip(arrays["input_ids"], arrays["attention_mask"], arrays["logits"], strict=True):
            own, places = logits[mask.astype(bool)], np.flatnonzero(np.isin(ids[mask.astype(bool)], media))
            wanted.append(own[places[-1] + 1 if len(places) else 0 :][-64:])  # the text after the last image
    for expected in wanted:
        found = reference[start : start + len(expected)]
        assert np.abs(found - expected).max() < LOGITS_BOUND
        start += len(expected)
    assert start == len(reference) >= 100
    assert reference.dtype == np.float32


def test_a_row_with_a_video_before_an_image(
    checkpoint: Checkpoint, golden: Callable[[str], Any], tmp_path: Path
) -> None:
    """Each placeholder gets its own: images are first in the stream, whatever the prompt says."""
    image, video = golden("a_single_image"), golden("d_video")
    ids = np.array([1, *[506] * 36, 2, *[505] * 24, 3])
    inputs = {
        "input_ids": ids,
        **{name: image.inputs[name] for name in ("pixel_values", "image_grid_thw")},
        **{name: video.inputs[name] for name in ("pixel_values_videos", "video_grid_thw")},
    }
    np.savez(tmp_path / "both.npz", **inputs)
    (tmp_path / "journal").mkdir()
    data = load_dataset(tmp_path / "both.npz", Preparer.from_directory(checkpoint.directory, checkpoint.config))
    _, journal = walked(checkpoint, [(data, False)], tmp_path / "journal", default_plan("float"))
    found = journal.streams["embeddings"]
    assert np.abs(found[ids == 505] - image.arrays["image_embeds"]).max() < EMBEDS_BOUND
    assert np.abs(found[ids == 506] - video.arrays["video_embeds"]).max() < EMBEDS_BOUND
    table = checkpoint.read("model.embed_tokens.weight")
    np.testing.assert_array_equal(found[[0, 37, 62]], table[[1, 2, 3]])


def test_a_plan_that_changes_nothing_solves_nothing(walk: tuple[Walk, Keeping]) -> None:
    assert walk[1].given == {}
    assert walk[1].notes == {}
    assert list(walk[1].values()) == []


def test_solving_leaves_the_walk_as_it_is(
    walk: tuple[Walk, Keeping], checkpoint: Checkpoint, rows: Callable[[str], Dataset], tmp_path: Path
) -> None:
    """Under another plan, with scales taken up on the way, the reference logits are the same bits."""
    plan = Plan("all", rules=(Rule("*", "*", "int8"),), kv_cache="int8")
    datasets = [(dataset, calibrating) for dataset, calibrating in walk[0].datasets]
    _, journal = walked(checkpoint, datasets, tmp_path, plan)
    assert any("strength" in note for note in journal.notes.values())
    np.testing.assert_array_equal(np.load(journal.path(REFERENCE)), np.load(walk[1].path(REFERENCE)))


def test_only_calibration_rows_are_looked_at(
    checkpoint: Checkpoint, rows: Callable[[str], Dataset], tmp_path: Path
) -> None:
    """What is evaluated changes no number that is found."""
    plan = Plan("all", rules=(Rule("*", "*", "int8"),), kv_cache="int8")
    calibration = (rows("b_two_images"), True)
    found = []
    for name, case in (("none", None), ("video", "d_video")):
        (tmp_path / name).mkdir()
        datasets = [calibration, *([(rows(case), False)] if case else [])]
        _, journal = walked(checkpoint, datasets, tmp_path / name, plan)
        found.append(journal.given)
        assert journal.path(REFERENCE).exists() is bool(case)
    assert found[0].keys() == found[1].keys()
    for name, values in found[0].items():
        np.testing.assert_array_equal(values, found[1][name], err_msg=name)


def test_progress_rises_to_the_whole(checkpoint: Checkpoint, rows: Callable[[str], Dataset], tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    datasets = [(rows("a_single_image"), True)]
    report = lambda *state: seen.append(state)  # noqa: E731
    Walk(checkpoint, default_plan("int8"), Methods(samples=16), datasets, Keeping(tmp_path), report, threads=1).run()
    done = [count for count, _, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1] == sum(tensor.size for tensor in checkpoint.tensors.values())
    labels = list(dict.fromkeys(label for _, _, label in seen))
    assert labels[:2] == ["visual.stem", "visual.blocks.0"]
    assert labels[-2:] == ["model.layers.2", "lm_head"]


class Broken(Checkpoint):
    """A checkpoint with one NaN in one of its tensors."""

    broken = ""

    def read(self, name: str) -> np.ndarray:
        values = super().read(name).copy()
        if name == self.broken:
            values[-1] = np.nan
        return values


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("model.layers.0.input_layernorm.weight", "the input of model.layers.0.self_attn.q_proj reaches NaN"),
        ("model.layers.1.mlp.down_proj.weight", "tensor model.layers.1.mlp.down_proj.weight holds NaN or infinity"),
        ("model.layers.1.post_attention_layernorm.weight", "the input of model.layers.1.mlp.gate_proj reaches NaN"),
        ("visual.blocks.0.mlp.fc2.bias", "the input of visual.blocks.1.attn.qkv reaches NaN or infinity"),
        ("visual.blocks.2.mlp.fc2.bias", "the input of visual.merger.mlp.0 reaches NaN or infinity"),
        ("visual.blocks.1.mlp.fc2.weight", "tensor visual.blocks.1.mlp.fc2.weight holds NaN or infinity"),
        ("model.norm.weight", "the input of lm_head reaches NaN or infinity"),
    ],
)
def test_what_is_not_finite_is_named_where_it_first_shows(
    checkpoint: Checkpoint, rows: Callable[[str], Dataset], tmp_path: Path, broken: str, message: str
) -> None:
    damaged = Broken(checkpoint.directory, checkpoint.config, checkpoint.tensors)
    damaged.broken = broken
    plan = Plan("all", rules=(Rule("*", "*", "fp8"),))
    with pytest.raises(OneVisionError, match=message):
        walked(damaged, [(rows("a_single_image"), True)], tmp_path, plan)
