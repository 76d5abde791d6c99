"""What the engines load, made from one seeded checkpoint and kept in the work folder."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from onevision_edge.config import read_json
from onevision_edge.export.checkpoint import locate

BENCHMARKS = Path(__file__).resolve().parent.parent
MAKE_CHECKPOINT = BENCHMARKS.parent / "tools" / "make_checkpoint.py"
MAX_LENGTH = 4096
DEMO = "demo"  # the shipped model, as a shape
TEXT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "hidden_act",
    "attention_bias",
)


class UnavailableError(Exception):
    """An engine cannot be had here; the message is the sentence that says why."""


class Files:
    """Every method returns a path, and makes what it names on first use.

    python: the peers' interpreter. say: takes a line for each file that is made.
    """

    def __init__(self, work: Path, shape: str, python: Path, say: Callable[[str], None]) -> None:
        self.work, self.shape, self.python, self.say = work, shape, python, say
        self.folder = work / shape
        self.folder.mkdir(parents=True, exist_ok=True)

    def checkpoint(self) -> Path:
        """The released layout, with the shipped model's tokenizer; or the shipped model."""
        if self.shape == DEMO:
            return locate(DEMO)
        options = ("--shape", self.shape, "--tokenizer", "demo")
        return self._made("checkpoint", lambda path: self._run(sys.executable, MAKE_CHECKPOINT, path, *options))

    def qwen3(self) -> Path:
        """The text half as transformers.Qwen3ForCausalLM reads it: the same files under another configuration."""
        checkpoint = self.checkpoint()

        def make(path: Path) -> None:
            path.mkdir()
            for file in checkpoint.iterdir():
                if file.name != "config.json" and file.suffix != ".jinja":
                    (path / file.name).symlink_to(file.resolve())
            text = read_json(checkpoint / "config.json")["text_config"]
            config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16"}
            config |= {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1}
            config |= {name: text[name] for name in TEXT_FIELDS}
            (path / "config.json").write_text(json.dumps(config, indent=1))

        return self._made("qwen3", make)

    def gguf(self, kind: str) -> Path:
        """In Q4_0 or Q8_0."""

        def make(path: Path) -> None:
            wide = path.with_name("wide.gguf")
            self._convert("gguf", self.qwen3(), wide)
            self._convert("llama-quantize", wide, path, kind)
            wide.unlink()

        return self._made(f"{kind}.gguf", make)

    def gguf_q4(self) -> Path:
        """Layers in Q4_0, the head in Q6_K."""
        return self.gguf("Q4_0")

    def gguf_q8(self) -> Path:
        """All in Q8_0."""
        return self.gguf("Q8_0")

    def openvino_text(self) -> Path:
        """By optimum-intel: INT4, symmetric, groups of 128; embeddings and head in INT8."""
        export = ("export", "openvino", "--task", "text-generation-with-past", "--weight-format", "int4")
        options = (
            "--sym",
            "--group-size",
            "128",
            "--group-size-fallback",
            "adjust",
            "--ratio",
            "1.0",
            "-m",
            self.qwen3(),
        )
        command = self.python.with_name("optimum-cli")
        return self._made("openvino-int4", lambda path: self._run(command, *export, *options, path))

    def onnx_genai(self) -> Path:
        """By onnxruntime-genai's builder: INT4 in blocks of 32, the head too, products in INT8."""
        if self.shape == DEMO:
            reason = "its builder (0.18.0) takes a product with as many outputs as there are tokens for the head"
            raise UnavailableError(f"{reason}, which the shipped model's MLP has, too")
        options = ("-p", "int4", "-e", "cpu", "--extra_options", "int4_block_size=32", "int4_accuracy_level=4")

        def make(path: Path) -> None:
            places = ("-i", self.qwen3(), "-o", path, "-c", path.with_name("cache"))
            self._run(self.python, "-m", "onnxruntime_genai.models.builder", *places, *options)

        return self._made("onnx-genai-int4", make)

    def openvino_vision(self) -> Path:
        """The tower in FP32, from our graph."""
        return self._openvino_vision("openvino-vision")

    def openvino_vision_int8(self) -> Path:
        """The tower with products in INT8, from our graph."""
        return self._openvino_vision("openvino-vision-int8")

    def tower(self) -> Path:
        """Our bundle in FP32, of the tower alone."""

        def make(path: Path) -> None:
            code = "import sys, onevision_edge as o; o.export(sys.argv[1], sys.argv[2], dtype='fp32', parts=['vision'])"
            self._run(sys.executable, "-c", code, self.checkpoint(), path)

        return self._made("tower", make)

    def reference(self) -> Path:
        """Our bundle in FP32."""
        options = ("--dtype", "fp32", "--max-length", MAX_LENGTH)
        return self._made("reference", lambda path: self._ours("export", self.checkpoint(), "-o", path, *options))

    def bundle(self) -> Path:
        """Ours as a CPU gets it: INT4, head in INT8. Random weights are rounded: they have nothing to calibrate for."""
        options = ["--target", "cpu", "--precision", "int4", "--max-length", MAX_LENGTH, "--no-evaluate"]
        if self.shape != DEMO:
            options += [word for name in ("awq", "gptq", "clip", "bias-correction") for word in ("--without", name)]
            options += ["--calibration-samples", 2]
        return self._made("bundle", lambda path: self._ours("quantize", self.checkpoint(), "-o", path, *options))

    def built_bundle(self) -> Path:
        """The same with what `onevision-edge build` makes of it for a CPU."""
        bundle = self.bundle()
        if not (bundle / "engines" / "cpu").exists():
            self._ours("build", bundle, "--target", "cpu")
        return bundle

    def _openvino_vision(self, name: str) -> Path:
        def make(path: Path) -> None:
            path.mkdir()
            self._convert(name, self.tower() / "vision.onnx", path / "model.xml")

        return self._made(name, make) / "model.xml"

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        path = self.folder / name
        if not path.exists():
            self.say(f"{self.shape}: making {name}")
            partial = self.folder / f"partial-{name}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.unlink(missing_ok=True)
            make(partial)
            partial.rename(path)
        return path

    def _convert(self, *words: object) -> None:
        self._run(self.python, "-m", "cpu.convert", *words, folder=BENCHMARKS)

    def _ours(self, *words: object) -> None:
        self._run(sys.executable, "-m", "onevision_edge", *words)

    def _run(self, *words: object, folder: Path | None = None) -> None:
        """Run a command at low priority. Raises UnavailableError with the last line that it printed."""
        log, command = self.work / "conversions.log", ["nice", "-n", "15", *map(str, words)]
        with open(log, "a") as file:
            failed = subprocess.run(command, cwd=folder or self.folder, stdout=file, stderr=file).returncode
        if failed:
            *_, last = ["", *log.read_text(errors="replace").strip().splitlines()]
            raise UnavailableError(f"{Path(command[3]).name} failed ({log}): {last}")
