"""A checkpoint's decoder as transformers.Qwen3ForCausalLM beside our bundles, on the same rows with image embeddings.

For benchmarks that compare with what is made for transformers models. Everything computes in FP32.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

import onevision_edge
from onevision_edge.calibration.dataset import SHIPPED_EVALUATION, Preparer, Row, load_dataset
from onevision_edge.calibration.quality import divergence, logits_of
from onevision_edge.calibration.scored import Scored, scored
from onevision_edge.export.checkpoint import Checkpoint
from onevision_edge.precision.formats import FORMATS, quantize
from onevision_edge.precision.plan import Plan, Precision, default_plan
from onevision_edge.runtime.token_model import Media

E4M3_LARGEST = 448.0


@dataclass(frozen=True, slots=True)
class Sample:
    """A row, where it is scored, and what the decoder reads for it: float32 [1, tokens, D]."""

    row: Row
    scored: Scored
    embeds: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Distance:
    """From full precision: KLD in nats and whether the likeliest token is the same, of every position, float64 [n]."""

    divergences: np.ndarray
    agreements: np.ndarray

    @property
    def kld(self) -> float:
        """The mean over positions."""
        return float(self.divergences.mean())

    @property
    def top1(self) -> float:
        """Top-1 agreement: the share of positions."""
        return float(self.agreements.mean())


def rows(source: str | Path | None, checkpoint: Checkpoint, model: onevision_edge.Model) -> list[Sample]:
    """The rows of a dataset as `quantize` takes it, in order; embeddings are those of an FP32 bundle, `model`."""
    preparer = Preparer.from_directory(checkpoint.directory, checkpoint.config)
    return [_sample(row, model) for row in load_dataset(source, preparer)]


def _sample(row: Row, model: onevision_edge.Model) -> Sample:
    media = {
        "image": Media(row.pixel_values, row.image_grid_thw),
        "video": Media(row.pixel_values_videos, row.video_grid_thw),
    }
    (prompt,) = model._embed([row.input_ids], media)
    return Sample(row, scored(row, model.config), prompt.embeds[None])


def bundle_logits(model: onevision_edge.Model, samples: Sequence[Sample]) -> np.ndarray:
    """Logits of a bundle at the scored positions of all rows: float32 [positions, vocab]."""
    return np.concatenate([logits_of(model, sample.row, sample.scored) for sample in samples])


def decoder_logits(decoder: Any, samples: Sequence[Sample]) -> np.ndarray:
    """As `bundle_logits`, of a transformers model."""
    return np.concatenate([decode(decoder, s)[s.scored.positions] for s in samples])


def decode(decoder: Any, sample: Sample) -> np.ndarray:
    """Logits of a transformers model: float32 [tokens, vocab]."""
    import torch

    with torch.no_grad():
        return decoder(inputs_embeds=torch.from_numpy(sample.embeds), use_cache=False).logits[0].numpy()


def qwen3(checkpoint: Checkpoint) -> Any:
    """transformers.Qwen3ForCausalLM in FP32 with the decoder's weights of a checkpoint."""
    import torch
    import transformers

    text = asdict(checkpoint.config.text)
    rope = {"rope_type": "default", "rope_theta": text["rope_theta"]}
    config = transformers.Qwen3Config(**text, rope_parameters=rope, tie_word_embeddings=checkpoint.tied)
    decoder = transformers.Qwen3ForCausalLM(config).eval()
    names = [name for name in checkpoint.tensors if not name.startswith("visual.")]
    values = {name: torch.from_numpy(checkpoint.read(name).astype(np.float32)) for name in names}
    missing, unexpected = decoder.load_state_dict(values, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= ({"lm_head.weight"} if checkpoint.tied else set()), missing
    return decoder


def linears(decoder: Any) -> Iterator[tuple[str, Any]]:
    """What every case quantises, by the checkpoint's names: the products in the decoder's layers."""
    import torch

    for name, module in decoder.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            yield f"model.layers.{name}", module


@dataclass(frozen=True, slots=True)
class Bench:
    """The rows, full precision's logits on those of evaluation, and how to measure a candidate against them."""

    name: str
    checkpoint: Checkpoint
    calibration: list[Sample]
    evaluation: list[Sample]
    reference: np.ndarray

    @classmethod
    def open(cls, name: str, calibration: str | None, evaluation: str | None, scratch: Path) -> "Bench":
        """Export the full-precision bundle and read the rows; transformers must agree with it on them."""
        checkpoint = Checkpoint.open(name)
        onevision_edge.export(name, scratch / "fp32", dtype="fp32")
        model = onevision_edge.load(scratch / "fp32")
        known = rows(calibration, checkpoint, model)
        asked = rows(evaluation or SHIPPED_EVALUATION, checkpoint, model)
        bench = cls(name, checkpoint, known, asked, bundle_logits(model, asked))
        apart = float(np.abs(decoder_logits(qwen3(checkpoint), asked) - bench.reference).max())
        click.echo(f"{len(known)} and {len(asked)} rows, {len(bench.reference)} positions scored", err=True)
        click.echo(f"transformers and the FP32 bundle are {apart:.1e} apart in logits", err=True)
        if apart > 1e-3:
            raise click.ClickException("transformers and the FP32 bundle disagree: this would compare nothing")
        return bench

    def decoder(self, decoder: Any) -> Distance:
        """Of a transformers model."""
        return self._distance(decoder_logits(decoder, self.evaluation))

    def bundle(self, path: Path) -> Distance:
        """Of a bundle, as its graph says: for speed the runtime rounds weight-only products' activations, too."""
        return self._distance(bundle_logits(onevision_edge.load(path, exact=True), self.evaluation))

    def _distance(self, logits: np.ndarray) -> Distance:
        agreements = self.reference.argmax(1) == logits.argmax(1)
        return Distance(divergence(self.reference, logits), agreements.astype(np.float64))

    def error(self, differences: np.ndarray) -> float:
        """Standard error of the mean of a figure of every position, [n]: rows are independent, not their positions."""
        counts = [len(sample.scored.positions) for sample in self.evaluation]
        starts = np.cumsum([0, *counts[:-1]])
        deviations = np.add.reduceat(differences - differences.mean(), starts)
        return float(np.sqrt(np.square(deviations).sum()) / len(differences))


def plan(precision: str) -> Plan:
    """Our plan with what ModelOpt leaves in FP32 left so: the head, the tower and the graph's own type."""
    return default_plan(precision, "fp32", lm_head="float")


def rounded(precision: str, checkpoint: Checkpoint, calibration: Sequence[Sample]) -> Any:
    """The decoder in our format with nothing searched."""
    import torch

    decoder, extremes, rules = qwen3(checkpoint), dict[str, float](), plan(precision)
    hooks = [linear.register_forward_pre_hook(_observer(extremes, name)) for name, linear in linears(decoder)]
    for sample in calibration:
        decode(decoder, sample)
    for hook in hooks:
        hook.remove()
    for name, linear in linears(decoder):
        form = rules.precision("decoder", name, linear.in_features)
        assert form.format is not None
        values = quantize(linear.weight.detach().numpy().T, FORMATS[form.format]).dequantize()
        linear.weight.data = torch.from_numpy(np.ascontiguousarray(values.T))
        linear.register_forward_pre_hook(_rounding(form, extremes[name]))
    return decoder


def _observer(extremes: dict[str, float], name: str) -> Callable[..., None]:
    def observe(_: Any, inputs: tuple[Any, ...]) -> None:
        extremes[name] = max(extremes.get(name, 0.0), float(inputs[0].abs().max()))

    return observe


def _rounding(form: Precision, extreme: float) -> Callable[..., Any]:
    """A hook that rounds an input as the graph does: one scale, known beforehand."""
    import torch

    def fake(_: Any, inputs: tuple[Any, ...]) -> Any:
        if form.activation == "int8":
            return (inputs[0] / (extreme / 127)).round().clamp(-128, 127) * (extreme / 127)
        if form.activation == "fp8":
            scaled = (inputs[0] / (extreme / E4M3_LARGEST)).clamp(-E4M3_LARGEST, E4M3_LARGEST)
            return scaled.to(torch.float8_e4m3fn).float() * (extreme / E4M3_LARGEST)
        return None

    return fake
