"""Our quantised bundles beside NVIDIA ModelOpt: the same decoder, calibration rows and evaluation rows, in one run.

    python benchmarks/modelopt.py [--checkpoint demo] [--precision int4] [--all] [--json]

ModelOpt quantises transformers.Qwen3ForCausalLM, which reads image embeddings among its inputs; ours is a bundle.
Both leave the head and the tower in FP32. KLD is that of the next token from full precision's, the mean over the
positions that predict an answer and its end, in millionths of a nat; top-1: how often both like the same token
best. "Rounded" is our format without any search: scales from extremes, those of activations, too. The error of a
difference is its standard error, rows taken as independent. * is what ModelOpt offers first for a format.

ModelOpt does INT8, INT4 and FP8 without a GPU. Its NVFP4 rounds in a CUDA kernel: there its algorithms run on the
formula of its documentation, which is checked against its packed tensors (NVFP4QTensor).

ModelOpt wants an environment of its own. These go together: torch 2.13.0+cpu, transformers 5.14.1, nvidia-modelopt
0.47.0 (which has requests imported, and not required).
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import ml_dtypes
import numpy as np
from qwen3_decoder import E4M3_LARGEST, Bench, Distance, Sample, decode, linears, plan, qwen3, rounded

from onevision_edge.cli.console import table
from onevision_edge.export.checkpoint import Checkpoint

INSTALL = "pip install 'torch>=2.8' 'transformers>=5,<5.15' nvidia-modelopt==0.47.0 requests"
FORMULA = "nvfp4-formula"
KERNEL = "its algorithm on its documented formula: its kernel needs CUDA"
E2M1_LARGEST, NVFP4_BLOCK = 6.0, 16


@dataclass(frozen=True, slots=True)
class Case:
    """A ModelOpt configuration, and the precision of ours it stands beside.

    default: the one its documentation offers for the format; the others are what else it can do. algorithm: in
    place of the configuration's. own_blocks: with our plan's blocks. weights_only: activations left as they are.
    """

    precision: str
    name: str
    config: str
    default: bool = False
    algorithm: dict[str, Any] | None = None
    own_blocks: bool = False
    weights_only: bool = False
    note: str = ""


AWQ_CLIP = {"method": "awq_full", "alpha_step": 0.1}
CASES = (
    Case("int8", "SmoothQuant", "INT8_SMOOTHQUANT_CFG", True, note="alpha 1"),
    Case("int8", "SmoothQuant, alpha 0.8", "INT8_SMOOTHQUANT_CFG", algorithm={"method": "smoothquant", "alpha": 0.8}),
    Case("int8", "SmoothQuant, alpha 0.5", "INT8_SMOOTHQUANT_CFG", algorithm={"method": "smoothquant", "alpha": 0.5}),
    Case("int8", "max", "INT8_DEFAULT_CFG"),
    Case("int8-weight", "max", "INT8_WEIGHT_ONLY_CFG", True),
    Case("int4", "AWQ", "INT4_AWQ_CFG", True, note="blocks of 128, the last of a row with what is left"),
    Case("int4", "AWQ, our blocks", "INT4_AWQ_CFG", own_blocks=True),
    Case("int4", "AWQ and clip", "INT4_AWQ_CFG", algorithm=AWQ_CLIP),
    Case("int4", "AWQ and clip, our blocks", "INT4_AWQ_CFG", algorithm=AWQ_CLIP, own_blocks=True),
    Case("int4", "max", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
    Case("fp8", "max", "FP8_DEFAULT_CFG", True, note="one scale a tensor"),
    Case("fp8", "per channel, per token", "FP8_PER_CHANNEL_PER_TOKEN_CFG", note="activation scales at run time"),
    Case("nvfp4", "max", "W4A16_NVFP4_CFG", True, note=KERNEL),
    Case("nvfp4", "AWQ", "NVFP4_AWQ_LITE_CFG", weights_only=True, note=KERNEL),
    Case("nvfp4", "scale sweep", "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG", weights_only=True, note=KERNEL),
    Case("nvfp4", "local Hessian", "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG", weights_only=True, note=KERNEL),
    Case("nvfp4", "max, W4A4", "NVFP4_DEFAULT_CFG", note="activations in FP4, too; " + KERNEL),
)


def import_modelopt() -> Any:
    """modelopt.torch.quantization, with its NVFP4 on the formula. This file's folder is no place to find modelopt."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    try:
        import modelopt.torch.quantization as mtq
    except ImportError as error:
        raise click.ClickException(f"nvidia-modelopt cannot be imported ({error}). To install it: {INSTALL}") from None
    _put_on_formula()
    return mtq


def nvfp4(values: Any, block_amax: Any, tensor_amax: Any, scale_largest: float = E4M3_LARGEST) -> Any:
    """NVFP4 by its documentation, rounded and dequantised: float32 [blocks, 16], [blocks, 1], [] -> [blocks, 16].

    Block scales are block_amax / 6 in E4M3, under the FP32 scale tensor_amax / (6 * 448); codes round to even.
    """
    import torch

    under = tensor_amax.float() / (E2M1_LARGEST * scale_largest)
    stored = (block_amax.float() / (E2M1_LARGEST * under)).clamp(max=E4M3_LARGEST).to(torch.float8_e4m3fn)
    scale = stored.float() * under
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (values.float() / scale).clamp(-E2M1_LARGEST, E2M1_LARGEST).numpy().astype(ml_dtypes.float4_e2m1fn)
    return torch.from_numpy(codes.astype(np.float32)) * scale


def _dynamic(values: Any, quantizer: Any) -> Any:
    """A backend of ModelOpt's quantisers: block scales from the values themselves."""
    blocks = values.reshape(-1, NVFP4_BLOCK)
    extremes = blocks.abs().amax(1, keepdim=True)
    return nvfp4(blocks, extremes, getattr(quantizer, "_amax", extremes.amax())).reshape(values.shape)


def _static(
    values: Any,
    amax: Any,
    tensor_amax: Any = None,
    quantize_scales: bool = True,
    largest: float = E4M3_LARGEST,
    dtype: Any = None,
) -> Any:
    """What ModelOpt calls where block scales were calibrated, in place of its Triton kernel."""
    assert quantize_scales
    return nvfp4(values, amax.reshape(-1, 1), amax.amax() if tensor_amax is None else tensor_amax, largest)


def _put_on_formula() -> None:
    import modelopt.torch.kernels.quantization.gemm as kernels
    import torch
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import register_quant_backend
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    values = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 192), np.float32))
    packed, scale, under = NVFP4QTensor.quantize(values.clone(), NVFP4_BLOCK)
    theirs = packed.dequantize(scale=scale, double_scale=under, block_sizes={-1: NVFP4_BLOCK})
    if not torch.equal(theirs, _dynamic(values, None)):
        raise click.ClickException("this ModelOpt's packed NVFP4 tensors are not what the formula gives")
    register_quant_backend(FORMULA, _dynamic)
    if not kernels.IS_AVAILABLE:
        kernels.IS_AVAILABLE, kernels.static_blockwise_fp4_fake_quant = True, _static


def configuration(mtq: Any, case: Case, decoder: Any) -> dict[str, Any]:
    """What ModelOpt is given for a case."""
    config = deepcopy(getattr(mtq, case.config))
    config["algorithm"] = case.algorithm or config["algorithm"]
    entries = config["quant_cfg"]
    for entry in entries:
        settings = entry.get("cfg", {})
        if settings.get("num_bits") == (2, 1) and settings["block_sizes"]["type"] == "dynamic":
            settings["backend"] = FORMULA
    if case.own_blocks:
        entries += [_block_entry(name, linear, case.precision) for name, linear in linears(decoder)]
    if case.weights_only:
        entries.append({"quantizer_name": "*input_quantizer", "enable": False})
    return config


def _block_entry(name: str, linear: Any, precision: str) -> dict[str, Any]:
    block = plan(precision).precision("decoder", name, linear.in_features).block
    return {
        "quantizer_name": f"{name}.weight_quantizer",
        "cfg": {"num_bits": 4, "block_sizes": {-1: block, "type": "static"}},
    }


def theirs(mtq: Any, case: Case, checkpoint: Checkpoint, calibration: Sequence[Sample]) -> Any:
    """The decoder as ModelOpt quantises it: weights rounded for good, activations when it runs."""
    decoder = qwen3(checkpoint)
    config = configuration(mtq, case, decoder)
    with redirect_stdout(sys.stderr):
        decoder = mtq.quantize(decoder, config, lambda model: [decode(model, sample) for sample in calibration])
        mtq.fold_weight(decoder)
    return decoder


def ours(checkpoint: str, output: Path, precision: str, calibration: str | None) -> Path:
    """Our bundle of the checkpoint, quantised with all that `quantize` does by default."""
    from onevision_edge.calibration.quantize import quantize as quantize_checkpoint

    quantize_checkpoint(checkpoint, output, plan=plan(precision), calibration=calibration, evaluate=False)
    return output


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say on stderr what took how long."""
    started = perf_counter()
    yield
    click.echo(f"{what}: {perf_counter() - started:.1f} s", err=True)


def own(bench: Bench, precision: str, calibration: str | None, scratch: Path) -> tuple[Distance, Distance]:
    """Our bundle's distance and that of plain rounding."""
    with timed(f"ours, {precision}"):
        found = bench.bundle(ours(bench.name, scratch / precision, precision, calibration))
    with timed(f"rounded, {precision}"):
        return found, bench.decoder(rounded(precision, bench.checkpoint, bench.calibration))


def compare(mtq: Any, bench: Bench, case: Case, found: Distance, plain: Distance) -> dict[str, Any]:
    """One line of the table."""
    with timed(f"ModelOpt, {case.precision} {case.name}"):
        other = bench.decoder(theirs(mtq, case, bench.checkpoint, bench.calibration))
    measured = {"modelopt": other, "ours": found, "rounded": plain}
    return {
        "precision": case.precision,
        "case": case.name,
        "config": case.config,
        "default": case.default,
        **{who: {"kld": distance.kld, "top1": distance.top1} for who, distance in measured.items()},
        "ratio": found.kld / other.kld,
        "difference": found.kld - other.kld,
        "error": bench.error(found.divergences - other.divergences),
        "note": case.note,
    }


def cells(line: dict[str, Any]) -> list[str]:
    """A line as the table shows it."""
    name = line["case"] + (" *" if line["default"] else "")
    figures = [text for who in ("modelopt", "ours", "rounded") for text in _figures(line[who])]
    difference = f"{1e6 * line['difference']:+.0f} ± {1e6 * line['error']:.0f}"
    return [line["precision"], name, *figures, f"{line['ratio']:.2f}", difference, line["note"]]


def _figures(distance: dict[str, float]) -> tuple[str, str]:
    return f"{1e6 * distance['kld']:.0f}", f"{distance['top1']:.4f}"


HEADER = ("format", "ModelOpt", "µKLD", "top-1", "ours", "top-1", "rounded", "top-1", "ratio", "ours - theirs", "note")


@click.command()
@click.option("--checkpoint", default="demo", show_default=True)
@click.option("--precision", "asked", multiple=True, type=click.Choice(list(dict.fromkeys(c.precision for c in CASES))))
@click.option("--calibration", help="Rows as onevision-edge quantize takes them; the shipped ones without.")
@click.option("--evaluation", help="The same for evaluation.")
@click.option("--all", "further", is_flag=True, help="ModelOpt's further settings, too: many minutes.")
@click.option("--threads", default=1, show_default=True, help="Of PyTorch; one is fastest on small models.")
@click.option("--json", "as_json", is_flag=True)
def main(
    checkpoint: str,
    asked: tuple[str, ...],
    calibration: str | None,
    evaluation: str | None,
    further: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Print KLD and top-1 of ModelOpt's configurations and of ours."""
    warnings.simplefilter("ignore")
    mtq = import_modelopt()
    import torch

    torch.set_num_threads(threads)
    cases = [c for c in CASES if (not asked or c.precision in asked) and (c.default or further)]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        bench = Bench.open(checkpoint, calibration, evaluation, scratch)
        found = {p: own(bench, p, calibration, scratch) for p in dict.fromkeys(c.precision for c in cases)}
        lines = [compare(mtq, bench, case, *found[case.precision]) for case in cases]
    if as_json:
        click.echo(json.dumps(lines, indent=1))
    else:
        click.echo(table([cells(line) for line in lines], HEADER))


if __name__ == "__main__":
    main()
