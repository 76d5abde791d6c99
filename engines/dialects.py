"""TensorRT-RTX and TensorRT: what each is called, what each builds, and where their interfaces differ.

Both share one Python API. TensorRT-RTX compiles ahead of time for a list of compute capabilities, without a GPU.
TensorRT compiles for the GPU it runs on. Graphs are strongly typed in either; in TensorRT 10 that is asked for, from
11 on there is nothing else.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import OneVisionError

VERBOSITIES = {"layer_names_only": "LAYER_NAMES_ONLY", "detailed": "DETAILED", "none": "NONE"}
COMPATIBILITIES = {"ampere+": "AMPERE_PLUS", "sameComputeCapability": "SAME_COMPUTE_CAPABILITY"}
POOLS = {"workspace": "WORKSPACE", "tacticSharedMem": "TACTIC_SHARED_MEMORY"}
_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options of a build under trtexec's names. memPoolSize: bytes by pool."""

    builderOptimizationLevel: int | None = None  # noqa: N815
    memPoolSize: Mapping[str, int] = field(default_factory=dict)  # noqa: N815
    timingCacheFile: str | None = None  # noqa: N815
    versionCompatible: bool = False  # noqa: N815
    hardwareCompatibilityLevel: str | None = None  # noqa: N815
    stripWeights: bool = False  # noqa: N815
    weightStreaming: bool = False  # noqa: N815
    profilingVerbosity: str | None = None  # noqa: N815

    def __post_init__(self) -> None:
        level = self.builderOptimizationLevel
        if level is not None and not 0 <= level <= 5:
            raise OneVisionError(f"--builderOptimizationLevel is {level}; it goes from 0 to 5")
        _one_of("hardwareCompatibilityLevel", self.hardwareCompatibilityLevel, COMPATIBILITIES)
        _one_of("profilingVerbosity", self.profilingVerbosity, VERBOSITIES)
        for pool in self.memPoolSize:
            _one_of("memPoolSize", pool, POOLS)

    def to_dict(self) -> dict[str, Any]:
        """What was asked for, as plain data."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False, {})}


def _one_of(option: str, value: str | None, known: Mapping[str, str]) -> None:
    if value is not None and value not in known:
        raise OneVisionError(f"--{option} is {value!r}: choose one of {', '.join(known)}")


def pool_sizes(text: str) -> dict[str, int]:
    """Bytes by pool from trtexec's workspace:4096 (MiB) or workspace:2G, comma-separated. Raises OneVisionError."""
    found = {}
    for item in text.split(","):
        pool, _, size = item.partition(":")
        unit = _UNITS.get(size[-1:].upper(), 0)
        number = size[:-1] if unit else size
        if not number.isdigit() or not int(number):
            raise OneVisionError(f"--memPoolSize is {text!r}: give pool:size, such as workspace:4096 (MiB) or :4G")
        found[pool] = int(number) * (unit or _UNITS["M"])
    return found


@dataclass(frozen=True, slots=True)
class Dialect:
    """One of the two. capabilities: what it builds for; None for that of the GPU at hand. lacks: options it refuses,
    and why. oldest: the first version that parses these graphs."""

    name: str
    title: str
    modules: tuple[str, ...]
    install: str
    oldest: tuple[int, int]
    capabilities: tuple[str, ...] | None
    lacks: Mapping[str, str]

    def load(self) -> Any:
        """Its Python module. Raises OneVisionError where it is not installed, or too old."""
        for name in self.modules:
            try:
                trt = importlib.import_module(name)
            except ImportError:
                continue
            if version_of(trt)[:2] < self.oldest:
                least = ".".join(map(str, self.oldest))
                raise OneVisionError(
                    f"{self.title} {trt.__version__} is too old for these graphs: {least} is the first"
                )
            return trt
        raise OneVisionError(f"{self.title} is not installed: {self.install}")

    def check(self, options: BuildOptions) -> None:
        """Raise OneVisionError for the first option that it lacks."""
        for option in options.to_dict():
            if option in self.lacks:
                raise OneVisionError(f"{self.title} has no --{option}: {self.lacks[option]}")


RTX = Dialect(
    "tensorrt-rtx",
    "TensorRT-RTX",
    ("tensorrt_rtx", "tensorrt_rtx_bindings"),
    "pip install --no-deps tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings",
    (1, 7),
    ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
    {
        "timingCacheFile": "it times no kernels, and a timing cache would make the build need a GPU; leave it out",
        "versionCompatible": "its engines run on the version that built them alone; build again for another",
        "hardwareCompatibilityLevel": "name several compute capabilities instead, --target sm80,sm86",
        "stripWeights": "without a GPU it cannot build stripped plans; leave it out",
    },
)
TENSORRT = Dialect(
    "tensorrt",
    "TensorRT",
    ("tensorrt",),
    "pip install tensorrt, or on Jetson take the one of JetPack",
    (10, 15),
    None,
    {},
)
DIALECTS = {dialect.name: dialect for dialect in (RTX, TENSORRT)}


def version_of(trt: Any) -> tuple[int, ...]:
    """A module's version as numbers."""
    return version_numbers(trt.__version__)


def version_numbers(text: str) -> tuple[int, ...]:
    """1.7.1.116 as numbers; what is not a number counts as 0."""
    return tuple(int(part) if part.isdigit() else 0 for part in text.split("."))


def create_network(trt: Any, dialect: str, builder: Any) -> Any:
    """A strongly typed network: by a flag in TensorRT 10, the only kind elsewhere."""
    flags = 0
    if dialect == TENSORRT.name and version_of(trt)[0] < 11:
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return builder.create_network(flags)


def logger(trt: Any, tell: Callable[[str, str], None]) -> Any:
    """A logger that gives messages to `tell`, with the name of their severity, and keeps errors in `errors`."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(message)
            tell(severity.name, message)

    return Log()


def first_line(errors: Sequence[str]) -> str:
    """The first of some errors, on one line."""
    return " ".join(errors[0].split()) if errors else "it does not say why"


def parse(trt: Any, dialect: Dialect, network: Any, log: Any, path: Path) -> Any:
    """Fill a network from the graph at `path`; returns the parser, which must outlive it. Raises OneVisionError."""
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise OneVisionError(f"{path.name}: {dialect.title} does not parse it: {first_line(errors)}")
    return parser


def configure(trt: Any, dialect: str, config: Any, options: BuildOptions, capabilities: tuple[str, ...]) -> None:
    """Set a builder config's options; `capabilities` are named to TensorRT-RTX alone."""
    if dialect == RTX.name:
        config.num_compute_capabilities = len(capabilities)
        for i, name in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), i)
    if options.builderOptimizationLevel is not None:
        config.builder_optimization_level = options.builderOptimizationLevel
    for pool, size in options.memPoolSize.items():
        config.set_memory_pool_limit(getattr(trt.MemoryPoolType, POOLS[pool]), size)
    if options.hardwareCompatibilityLevel is not None:
        level = COMPATIBILITIES[options.hardwareCompatibilityLevel]
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if options.profilingVerbosity is not None:
        config.profiling_verbosity = getattr(trt.ProfilingVerbosity, VERBOSITIES[options.profilingVerbosity])
    for wanted, flag in (
        (options.versionCompatible, "VERSION_COMPATIBLE"),
        (options.stripWeights, "STRIP_PLAN"),
        (options.weightStreaming, "WEIGHT_STREAMING"),
    ):
        if wanted:
            config.set_flag(getattr(trt.BuilderFlag, flag))
    if options.timingCacheFile is not None:
        path = Path(options.timingCacheFile)
        config.set_timing_cache(config.create_timing_cache(path.read_bytes() if path.is_file() else b""), False)


def add_profiles(builder: Any, network: Any, config: Any, ranges: list[list[dict[str, Any]]]) -> None:
    """One optimisation profile for each list of input ranges (profiles.InputRange as plain data)."""
    values = {t.name for t in (network.get_input(i) for i in range(network.num_inputs)) if t.is_shape_tensor}
    for inputs in ranges:
        profile = builder.create_optimization_profile()
        declared = {r["name"] for r in inputs if r["values"]}
        if declared != values:
            raise OneVisionError(
                f"the network's shape tensors are {', '.join(sorted(values)) or 'none'}, not "
                f"{', '.join(sorted(declared)) or 'none'}"
            )
        for r in inputs:
            set_range = profile.set_shape_input if r["values"] else profile.set_shape
            set_range(r["name"], tuple(r["min"]), tuple(r["opt"]), tuple(r["max"]))
        config.add_optimization_profile(profile)
