"""A bundle's graphs run stage by stage on ONNX Runtime, with a probe between them.

They take the place of backend.Graph in the runtime, so that what is looked into is what the runtime does: its images,
its stitching, its positions, its KV cache. A stage's session is opened when it runs and closed after it where the
graph is large, so that memory holds the weights of one stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ...bundle import Bundle, GraphSpec
from ...config import VisionConfig
from ...errors import OneVisionError
from ...precision import FloatFormat, float32, float_format, from_float32
from ...runtime.backend import DISABLED_OPTIMIZERS, PROVIDERS, SessionOptions, first_line
from ...runtime.stitching import OnHost
from ...runtime.wide import widened
from .cuts import PRELUDE, Cut, CutGraph
from .probe import LOGITS, Probe


@dataclass
class Staged:
    """The graphs of a bundle in stages, as a backend; `probe` looks at those that are open.

    memory: bytes that they may take: where all stages need more, one at a time is loaded. rounded: values in BF16.
    """

    options: SessionOptions = field(default_factory=SessionOptions)
    memory: int = 1 << 62
    rounded: bool = False
    probe: Probe | None = None

    def open(self, bundle: Bundle, part: str) -> Any:
        """A graph, cut into stages. Raises OneVisionError."""
        return StagedGraph(bundle, part, self)


class StagedGraph(OnHost):
    """One graph in stages; it takes what backend.Graph does."""

    def __init__(self, bundle: Bundle, part: str, backend: Staged) -> None:
        self.spec: GraphSpec = bundle.graph(part)
        self.fmt: FloatFormat = float_format(self.spec.dtype)
        if self.fmt.name == "bf16":
            raise OneVisionError(
                f"{bundle.directory}: ONNX Runtime's CPU provider has no bfloat16 kernels to look into a bf16 bundle "
                "with; export with --dtype fp32 or fp16, or build its cpu engine"
            )
        self.backend, self.part = backend, part
        self.cut = CutGraph(_file(bundle, self.spec), part)
        data = bundle.path(self.spec.file + ".data")
        self._wide = {} if self.spec.wide is None else {w.name: w for w in self.spec.wide.weights}
        self._data = data
        weights = sum(sum(graph.weights.values()) for graph in bundle.manifest.graphs.values())
        self._keep = 3 * weights <= backend.memory  # a copy that is widened or repacked beside the file's
        self._open: dict[str, ort.InferenceSession] = {}

    @property
    def cache_dtype(self) -> np.dtype:
        """Of the decoder's KV cache: the graph's float, or int8."""
        return np.dtype(np.int8) if self.spec.int8_cache else self.fmt.numpy

    def images_per_call(self, config: VisionConfig, size: tuple[int, int]) -> int:
        """Images of a size that share a call: one."""
        return 1

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Zeroed memory."""
        return np.zeros(shape, dtype)

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The tower's image_embeds, [1, image_tokens, D]."""
        return [self.pass_through(inputs, {})["image_embeds"]]

    def bind(self) -> "StagedBinding":
        """A binding of the decoder to a cache."""
        return StagedBinding(self)

    def pass_through(self, inputs: Mapping[str, np.ndarray], caches: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run all stages; returns what the last gives. caches: past_key.i and past_value.i, updated where they lie."""
        values, stream = dict(inputs), "pixel_values"
        for cut in self.cut.cuts:
            values |= self._run(cut, cut.stream or stream, values, caches)
            if cut.stream is not None:
                del values[cut.stream]
        return values

    def module_outputs(
        self, stage: str, rows: np.ndarray, inputs: Mapping[str, np.ndarray], caches: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """What every module of a stage gives when the stage reads `rows` [n, width]: float32 by its path."""
        cut = next(cut for cut in self.cut.cuts if cut.stage == stage)
        first = self.cut.cuts[0]
        values = dict(inputs)
        if cut is not first:
            values |= self._once(first, values, caches, ())
            values[str(cut.stream)] = from_float32(rows, self.fmt)[None]
        names = self.cut.modules(cut)
        found = self._once(cut, values, caches, [*names.values()])
        return {module: float32(found[name], self.fmt) for module, name in names.items()}

    def floats(self, values: np.ndarray) -> np.ndarray:
        """float32 values in the graph's format."""
        return from_float32(values, self.fmt)

    def empty_caches(self, batch: int) -> dict[str, np.ndarray]:
        """A KV cache in which nothing is written, by the names of the graph's inputs."""
        shapes = {t.name: (batch, *t.shape[1:]) for t in self.spec.inputs if t.name.startswith("past_")}
        return {name: np.zeros(tuple(map(int, shape)), self.cache_dtype) for name, shape in shapes.items()}

    def _run(
        self, cut: Cut, stream: str, values: dict[str, np.ndarray], caches: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """One stage, its stream shown to the probe before and after."""
        probe = self.backend.probe
        if probe is None or cut.stage == PRELUDE:
            return self._call(self._session(cut), cut.inputs, cut.outputs, values, caches)
        read = values[stream]
        shown = probe.before(cut.stage, float32(read, self.fmt).reshape(-1, read.shape[-1]))
        values[stream] = from_float32(shown, self.fmt).reshape((1, *shown.shape))
        found = self._call(self._session(cut), cut.inputs, cut.outputs, values, caches)
        if cut.stage != LOGITS:
            given = found[self._given(cut)]
            probe.after(cut.stage, float32(given, self.fmt).reshape(-1, given.shape[-1]))
        return found

    def _given(self, cut: Cut) -> str:
        """The output of a stage that the next one reads as its stream."""
        following = self.cut.cuts[self.cut.cuts.index(cut) + 1 :]
        return str(following[0].stream) if following else cut.outputs[0]

    def _session(self, cut: Cut) -> ort.InferenceSession:
        if cut.stage not in self._open:
            if not self._keep:
                self._open.clear()
            self._open[cut.stage] = self._made(cut, ())
        return self._open[cut.stage]

    def _once(
        self, cut: Cut, values: Mapping[str, np.ndarray], caches: Mapping[str, np.ndarray], taps: Sequence[str]
    ) -> dict[str, np.ndarray]:
        taps = [name for name in taps if name not in cut.outputs]
        return self._call(self._made(cut, taps), cut.inputs, (*cut.outputs, *taps), values, caches)

    def _made(self, cut: Cut, taps: Sequence[str]) -> ort.InferenceSession:
        """A session of one stage, its weights where the bundle has them."""
        model = self.cut.stage_model(cut, rounded=self.backend.rounded, taps=taps)
        options = self.backend.options.build(self.spec.quantized)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._data.parent))
        wide = self._widened(model)
        if wide:
            options.add_external_initializers(list(wide), list(wide.values()))
        try:
            return ort.InferenceSession(
                model.SerializeToString(),
                options,
                providers=[PROVIDERS["cpu"]],
                disabled_optimizers=DISABLED_OPTIMIZERS,
            )
        except Exception as error:  # ONNX Runtime's exceptions share no useful base
            raise OneVisionError(f"{self.cut.path}: {cut.stage} does not load: {first_line(error)}") from error

    def _widened(self, model: Any) -> dict[str, Any]:
        """NVFP4 weights of a stage as their twins in INT8."""
        wanted = [name.name for name in model.graph.initializer if name.name in self._wide]
        return {k: v for name in wanted for k, v in widened(self._data, self._wide[name], self.fmt).items()}

    def _call(
        self,
        session: ort.InferenceSession,
        inputs: Sequence[str],
        outputs: Sequence[str],
        values: Mapping[str, np.ndarray],
        caches: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        binding = session.io_binding()
        held = [(name, ort.OrtValue.ortvalue_from_numpy(_array(name, values, caches))) for name in inputs]
        for name, value in held:
            binding.bind_ortvalue_input(name, value)
        in_place = {name.replace("past", "present", 1): value for name, value in held if name in caches}
        for name in outputs:
            if name in in_place:
                binding.bind_ortvalue_output(name, in_place[name])
            else:
                binding.bind_output(name)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            raise OneVisionError(f"{self.cut.path}: {first_line(error)}") from error
        pairs = zip(outputs, binding.get_outputs(), strict=True)
        return {name: value.numpy() for name, value in pairs if name not in in_place}


class StagedBinding:
    """The decoder in stages, bound to a cache: takes what backend.Binding does."""

    def __init__(self, graph: StagedGraph) -> None:
        self.graph = graph
        self._inputs: dict[str, np.ndarray] = {}
        self._caches: dict[str, np.ndarray] = {}
        self._logits = np.empty(0, np.float32)

    def input(self, name: str, array: np.ndarray) -> None:
        """Bind an array to an input."""
        self._inputs[name] = array

    def in_place(self, past: str, present: str, array: np.ndarray) -> None:
        """Bind one contiguous array to an input and to the output that updates it."""
        self._caches[past] = array

    def output(self, name: str, array: np.ndarray) -> None:
        """Bind a contiguous array to receive the logits."""
        self._logits = array

    def run(self) -> None:
        """Run on what is bound."""
        self._logits[...] = self.graph.pass_through(self._inputs, self._caches)["logits"]


def _file(bundle: Bundle, spec: GraphSpec) -> Path:
    """The file that ONNX Runtime runs: the graph's twin where it has one."""
    return bundle.path(spec.wide.file if spec.wide is not None else spec.file)


def _array(name: str, values: Mapping[str, np.ndarray], caches: Mapping[str, np.ndarray]) -> np.ndarray:
    return caches[name] if name in caches else np.ascontiguousarray(values[name])
