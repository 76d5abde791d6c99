"""What devices are: compute capability, memory, bandwidth and peak rates, each row with its source.

Rates are dense (half of the sparse figures that datasheets like to print), in 10^12 operations a second, a multiply
and an add being two. FP16 and FP8 are the rates with FP16 accumulation; with FP32 accumulation GeForce cards have half
of them, the others the same. Memory is nominal: the driver takes a part, and on Jetson the operating system and the
processor share it. Bandwidth is that of the memory, in 10^9 bytes a second.

A source says how far it was followed: "read" (NVIDIA's own page), "read in a copy" (a page that quotes it); what it
does not call read is stated without opening NVIDIA's text again. tests/test_targets.py holds every rate against
multiprocessors x clock x operations of a tensor core, and every bandwidth against width x speed of the memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Capability:
    """What TensorRT builds for a compute capability.

    precisions: of int8, int4, fp8, nvfp4. dtypes: what graphs may compute in. examples: devices people know.
    decoder, reason: the default precision of the decoder's layers, and why.
    """

    name: str
    precisions: tuple[str, ...]
    source: str
    examples: str
    decoder: str
    reason: str
    dtypes: tuple[str, ...] = ("fp16", "bf16", "fp32")


@dataclass(frozen=True, slots=True)
class Device:
    """A row of the table: memory in GiB, bandwidth in GB/s, rates in 10^12 a second.

    decoder, reason: where they differ from the compute capability's.
    """

    name: str
    capability: str
    memory: int
    bandwidth: float
    rates: Mapping[str, float]
    source: str
    decoder: str | None = None
    reason: str | None = None


BUILT = "built by TensorRT-RTX 1.7, with and without each precision (tests/test_targets.py)"
_BANDWIDTH = "decode reads every weight for each token, so at batch 1 bandwidth decides"
_INT4 = f"{_BANDWIDTH}: INT4 reads a quarter of FP16's bytes"
_NVFP4 = (
    f"{_BANDWIDTH}: NVFP4 reads little more than a quarter of FP16's bytes, "
    "and a scale for 16 weights holds more than INT4's for 32 or 128"
)
_SERVER = "a server batches, where arithmetic decides: FP8 runs at twice FP16's rate and errs less than four bits"

_INT = ("int8", "int4")
_FP8 = (*_INT, "fp8")
_ALL = (*_FP8, "nvfp4")

CAPABILITIES = {
    c.name: c
    for c in (
        Capability(
            "sm75",
            ("int8",),
            f"{BUILT}: INT8 in FP16 graphs alone; its support matrix promises FP16 alone",
            "T4, RTX 20",
            "int8",
            "the only quantised form that is built for it: half of FP16's bytes in decode, twice its rate in prefill",
            ("fp16",),
        ),
        Capability("sm80", _INT, BUILT, "A100, A30", "int4", _INT4),
        Capability("sm86", _INT, BUILT, "A10, RTX 30", "int4", _INT4),
        Capability(
            "sm87",
            _INT,
            "TensorRT Edge-LLM 0.11 support matrix: Orin takes FP16, INT8 and INT4 only; read, not built",
            "Jetson Orin, DRIVE Orin",
            "int4",
            _INT4,
        ),
        Capability("sm89", _FP8, BUILT, "L4, L40S, RTX 40", "int4", f"{_INT4}, half of FP8's"),
        Capability(
            "sm90",
            _FP8,
            "TensorRT-LLM 0.18 support matrix: Hopper takes FP8, INT8 and INT4; read, not built",
            "H100, H200, GH200",
            "fp8",
            _SERVER,
        ),
        Capability(
            "sm100",
            _ALL,
            "Model Optimizer support matrix: INT8 and INT4 from Ampere, FP8 from Ada, FP4 from Blackwell; "
            "read, not built",
            "B200, GB200",
            "nvfp4",
            _NVFP4,
        ),
        Capability(
            "sm110",
            _ALL,
            "DRIVE OS 7.0.3 TensorRT release notes: INT8 and FP8 on Thor, which CUDA 12 called sm101; "
            "Model Optimizer support matrix: INT4 and FP4; read, not built",
            "Jetson Thor, DRIVE Thor",
            "nvfp4",
            _NVFP4,
        ),
        Capability("sm120", _ALL, BUILT, "RTX 50, RTX PRO Blackwell", "nvfp4", _NVFP4),
        Capability("sm121", _ALL, BUILT, "DGX Spark", "nvfp4", _NVFP4),
    )
}
# The first compute capability that has a precision.
SINCE = {"int8": "sm75", "int4": "sm80", "fp8": "sm89", "nvfp4": "sm100"}


def _sm7_8(fp16: float, int8: float) -> dict[str, float]:
    return {"fp16": fp16, "int8": int8}


def _sm89_90(fp16: float, eight: float) -> dict[str, float]:
    """INT8 and FP8 run at one rate."""
    return {"fp16": fp16, "int8": eight, "fp8": eight}


def _blackwell(nvfp4: float) -> dict[str, float]:
    """Eight bits run at half the rate of FP4, FP16 at a quarter."""
    return {"fp16": nvfp4 / 4, "int8": nvfp4 / 2, "fp8": nvfp4 / 2, "nvfp4": nvfp4}


_A100 = "NVIDIA A100 datasheet"
_GA102 = "NVIDIA Ampere GA102 whitepaper; not re-read"
_ADA = "NVIDIA Ada GPU architecture whitepaper"
_RTX50 = "NVIDIA RTX Blackwell whitepaper and product page: half of the AI TOPS, which are sparse FP4"
_ORIN = "Jetson Orin data sheet and JetPack 6.2 notes: the GPU's share of the INT8 TOPS, without the DLA's"
_BLACKWELL = "NVIDIA Blackwell datasheet; read in a copy"

DEVICES = (
    Device("t4", "sm75", 16, 320, _sm7_8(65, 130), "NVIDIA T4 product brief; memory read in a copy"),
    Device("a100-40gb-pcie", "sm80", 40, 1555, _sm7_8(312, 624), f"{_A100}; read in a copy"),
    Device("a100-40gb-sxm", "sm80", 40, 1555, _sm7_8(312, 624), f"{_A100}; read in a copy"),
    Device("a100-80gb-pcie", "sm80", 80, 1935, _sm7_8(312, 624), f"{_A100}; bandwidth not re-read"),
    Device("a100-80gb-sxm", "sm80", 80, 2039, _sm7_8(312, 624), f"{_A100}; read in a copy"),
    Device("a30", "sm80", 24, 933, _sm7_8(165, 330), "NVIDIA A30 datasheet; not re-read"),
    Device("a2", "sm86", 16, 200, _sm7_8(18, 36), "NVIDIA A2 datasheet; rates read in a copy"),
    Device("a10", "sm86", 24, 600, _sm7_8(125, 250), "NVIDIA A10 datasheet; not re-read"),
    Device("a40", "sm86", 48, 696, _sm7_8(149.7, 299.3), "NVIDIA A40 datasheet; read in a copy"),
    Device("rtx-a6000", "sm86", 48, 768, _sm7_8(154.8, 309.7), "RTX A6000 datasheet; memory read in a copy"),
    Device("rtx-3060", "sm86", 12, 360, _sm7_8(51, 102), "NVIDIA product page, 12 GB; memory read in a copy"),
    Device("rtx-3070", "sm86", 8, 448, _sm7_8(81.3, 162.6), _GA102),
    Device("rtx-3080", "sm86", 10, 760, _sm7_8(119, 238), f"{_GA102}; 10 GB"),
    Device("rtx-3090", "sm86", 24, 936, _sm7_8(142, 284), _GA102),
    Device("jetson-orin-nano-8gb", "sm87", 8, 68, _sm7_8(10, 20), f"{_ORIN}; read in a copy"),
    Device("jetson-orin-nano-8gb-super", "sm87", 8, 102, _sm7_8(16.7, 33.5), f"{_ORIN}; read in a copy"),
    Device("jetson-orin-nx-8gb", "sm87", 8, 102.4, _sm7_8(12.5, 25), f"{_ORIN}; not re-read"),
    Device("jetson-orin-nx-8gb-super", "sm87", 8, 102.4, _sm7_8(19.2, 38.5), f"{_ORIN}; not re-read"),
    Device("jetson-orin-nx-16gb", "sm87", 16, 102.4, _sm7_8(15, 30), f"{_ORIN}; not re-read"),
    Device("jetson-orin-nx-16gb-super", "sm87", 16, 102.4, _sm7_8(19.2, 38.5), f"{_ORIN}; not re-read"),
    Device("jetson-agx-orin-32gb", "sm87", 32, 204.8, _sm7_8(27, 54), "AGX Orin Technical Brief; not re-read"),
    Device(
        "jetson-agx-orin-64gb",
        "sm87",
        64,
        204.8,
        _sm7_8(42.5, 85),
        "AGX Orin Technical Brief; not re-read, but NVIDIA's DLA notes, read, give the GPU 171 TOPS sparse",
    ),
    Device(
        "drive-orin",
        "sm87",
        32,
        204.8,
        _sm7_8(41.75, 83.5),
        "DRIVE AGX Orin developer kit: 167 of its 254 INT8 TOPS are the GPU's, sparse; not re-read",
    ),
    Device("l4", "sm89", 24, 300, _sm89_90(121, 242.5), "NVIDIA L4 datasheet; not re-read"),
    Device(
        "l40s", "sm89", 48, 864, _sm89_90(362.05, 733), "NVIDIA L40S datasheet; rates read in a copy", "fp8", _SERVER
    ),
    Device("rtx-6000-ada", "sm89", 48, 960, _sm89_90(364.2, 728.5), "RTX 6000 Ada datasheet; not re-read"),
    Device("rtx-4060", "sm89", 8, 272, _sm89_90(60.5, 121), "NVIDIA product page, 8 GB; not re-read"),
    Device("rtx-4070", "sm89", 12, 504, _sm89_90(116.6, 233.2), "NVIDIA product page; read in a copy"),
    Device("rtx-4080", "sm89", 16, 716.8, _sm89_90(194.9, 389.9), f"{_ADA}; clock and memory read in a copy"),
    Device("rtx-4090", "sm89", 24, 1008, _sm89_90(330.3, 660.6), f"{_ADA}; INT8 rate read in a copy"),
    Device("h100-80gb-pcie", "sm90", 80, 2000, _sm89_90(756, 1513), "NVIDIA H100 datasheet; read in a copy"),
    Device("h100-80gb-sxm", "sm90", 80, 3350, _sm89_90(989, 1979), "NVIDIA H100 datasheet; read in a copy"),
    Device("h200", "sm90", 141, 4800, _sm89_90(989, 1979), "NVIDIA H200 datasheet, SXM; read in a copy"),
    Device("gh200-96gb", "sm90", 96, 4000, _sm89_90(990, 1979), "NVIDIA GH200 datasheet; not re-read"),
    Device("gh200-144gb", "sm90", 144, 4900, _sm89_90(990, 1979), "NVIDIA GH200 datasheet; not re-read"),
    Device("b200", "sm100", 180, 7700, _blackwell(9000), f"{_BLACKWELL}, HGX"),
    Device("gb200", "sm100", 186, 8000, _blackwell(10000), f"{_BLACKWELL}, one GPU of NVL72"),
    Device(
        "jetson-thor-t4000",
        "sm110",
        64,
        273,
        _blackwell(600),
        "Jetson T4000: 1,200 TFLOPS of sparse FP4, the others by ratio; not re-read",
    ),
    Device(
        "jetson-thor-t5000",
        "sm110",
        128,
        273,
        _blackwell(1035),
        "Jetson T5000: 2,070 TFLOPS of sparse FP4, read in a copy; INT8 as FP8, as announced for DRIVE Thor",
    ),
    Device(
        "drive-thor",
        "sm110",
        64,
        273,
        _blackwell(1000),
        "DRIVE AGX Thor developer kit: 1,000 INT8 TOPS, read in a copy, taken as sparse; memory not re-read",
    ),
    Device("rtx-5060", "sm120", 8, 448, _blackwell(307), f"{_RTX50}; not re-read"),
    Device("rtx-5070", "sm120", 12, 672, _blackwell(494), f"{_RTX50}; not re-read"),
    Device("rtx-5070-ti", "sm120", 16, 896, _blackwell(703), f"{_RTX50}; not re-read"),
    Device("rtx-5080", "sm120", 16, 960, _blackwell(900.4), f"{_RTX50}; read in a copy"),
    Device("rtx-5090", "sm120", 32, 1792, _blackwell(1676), f"{_RTX50}; memory and clock read in a copy"),
    Device("rtx-pro-6000-blackwell", "sm120", 96, 1792, _blackwell(2015), f"{_RTX50}, workstation; read in a copy"),
    Device(
        "dgx-spark",
        "sm121",
        128,
        273,
        _blackwell(500),
        "DGX Spark: 1 PFLOP of sparse FP4, a round number, the others by ratio; memory read in a copy",
    ),
)
