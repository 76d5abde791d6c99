"""Which module of which graph gets which precision: data that is printed, stored, written by hand and searched.

A plan is a list of rules; the last one that matches a module decides. Modules go by the checkpoint's names
without ".weight": visual.blocks.3.attn.qkv, model.layers.0.mlp.down_proj, lm_head. Only products with weights are
asked: normalisations, softmax and rotary angles are computed in FP32 in every plan.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from ..errors import OneVisionError
from . import float_format

GRAPHS = ("vision", "decoder")


@dataclass(frozen=True, slots=True)
class Precision:
    """What a product of activations and weights is stored and computed in.

    format: of the weights, a name of formats.FORMATS; None for the graph's own float. activation: the codes its
    input is rounded to (int8 or fp8), or None. block: input rows that share a scale; 0 for all of them.
    bits: per weight, scales apart. needs: what a target must have.
    """

    name: str
    format: str | None = None
    activation: str | None = None
    block: int = 0
    bits: float = 0
    needs: str | None = None


FLOAT = Precision("float")
PRECISIONS = {
    p.name: p
    for p in (
        FLOAT,
        Precision("int8", "int8-channel", "int8", 0, 8, "int8"),
        Precision("int8-weight", "int8-channel", None, 0, 8, "int8"),
        Precision("int4-block128", "int4-block128", None, 128, 4, "int4"),
        Precision("int4-block32", "int4-block32", None, 32, 4, "int4"),
        Precision("fp8", "fp8-channel", "fp8", 0, 8, "fp8"),
        Precision("nvfp4", "nvfp4", None, 16, 4, "nvfp4"),
    )
}
# NVFP4's numbers for an engine without FP4; nobody asks for it by name.
PRECISIONS["int8-block16"] = Precision("int8-block16", "int8-block16", None, 16, 8, "int8")
INT4_BLOCKS = ("int4-block128", "int4-block32")  # what int4 stands for: the first whose blocks divide the inputs
NAMES = ("float", "int8", "int8-weight", "int4", *INT4_BLOCKS, "fp8", "nvfp4")
CACHES = ("float", "int8")


@dataclass(frozen=True, slots=True)
class Rule:
    """Modules of a graph (names with *, ?, [] as in file names) get a precision, for a reason."""

    graph: str
    modules: str
    precision: str
    reason: str = ""

    def matches(self, graph: str, module: str) -> bool:
        """Whether the rule speaks of this module."""
        return self.graph in (graph, "*") and fnmatchcase(module, self.modules)


@dataclass(frozen=True, slots=True)
class Plan:
    """Precisions of a bundle: dtype is what the graphs compute in where no rule says otherwise."""

    name: str
    dtype: str = "fp16"
    kv_cache: str = "float"
    rules: tuple[Rule, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        float_format(self.dtype)
        if self.kv_cache not in CACHES:
            raise OneVisionError(f"kv_cache is {self.kv_cache!r}: choose one of {', '.join(CACHES)}")
        for rule in self.rules:
            if rule.graph not in (*GRAPHS, "*"):
                raise OneVisionError(f"rule for {rule.modules}: graph is {rule.graph!r}, not vision, decoder or *")
            check_name(rule.precision)

    def rule(self, graph: str, module: str) -> Rule | None:
        """The rule that decides about a module."""
        return next((rule for rule in reversed(self.rules) if rule.matches(graph, module)), None)

    def precision(self, graph: str, module: str, inputs: int) -> Precision:
        """The precision of a module with so many inputs. Raises OneVisionError where blocks do not divide them."""
        rule = self.rule(graph, module)
        if rule is None:
            return FLOAT
        names = INT4_BLOCKS if rule.precision == "int4" else (rule.precision,)
        for name in names:
            if PRECISIONS[name].block == 0 or inputs % PRECISIONS[name].block == 0:
                return PRECISIONS[name]
        raise OneVisionError(
            f"{module} has {inputs} inputs, which {rule.precision}'s blocks of {PRECISIONS[names[-1]].block} do not "
            f"divide: give it another precision by a rule for {module}"
        )

    @property
    def quantized(self) -> bool:
        """Whether any rule asks for less than the graph's float, or the cache is quantised."""
        return self.kv_cache != "float" or any(rule.precision != "float" for rule in self.rules)

    @property
    def needs(self) -> tuple[str, ...]:
        """What a target must have: int8, int4, fp8, nvfp4."""
        names = [PRECISIONS[INT4_BLOCKS[0] if r.precision == "int4" else r.precision].needs for r in self.rules]
        names += ["int8"] if self.kv_cache == "int8" else []
        return tuple(dict.fromkeys(name for name in names if name))

    def with_rules(self, rules: Iterable[Rule]) -> "Plan":
        """The plan with further rules, which win over those it has."""
        return replace(self, rules=(*self.rules, *rules))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "plan") -> "Plan":
        """The inverse of `to_dict`; what is missing takes its default. Raises OneVisionError."""
        known = set(cls.__dataclass_fields__)
        unknown = sorted(set(raw) - known)
        if unknown:
            raise OneVisionError(f"{where} has an unknown {unknown[0]!r}; it can have {', '.join(sorted(known))}")
        try:
            rules = tuple(Rule(**rule) for rule in raw.get("rules", ()))
        except TypeError as error:
            raise OneVisionError(
                f"{where}: a rule has graph, modules, precision and reason, and nothing else ({error})"
            ) from error
        for rule in rules:
            if not all(isinstance(value, str) for value in (rule.graph, rule.modules, rule.precision, rule.reason)):
                raise OneVisionError(f"{where}: a rule's graph, modules, precision and reason are texts, not {rule}")
        return cls(
            name=str(raw.get("name", "custom")),
            dtype=str(raw.get("dtype", "fp16")),
            kv_cache=str(raw.get("kv_cache", "float")),
            rules=rules,
        )


def check_name(name: str) -> None:
    """Raise OneVisionError unless `name` is a precision."""
    if name not in NAMES and name != "int8-block16":
        raise OneVisionError(f"unknown precision {name!r}: choose one of {', '.join(NAMES)}")


# Why a decoder is stored so, beside the choice itself.
_REASONS = {
    "int8": "W8A8: half the bytes of FP16 and twice its rate in prefill; smoothed, so that outliers fit one scale",
    "int8-weight": "half the bytes of FP16 at almost none of its accuracy; activations stay as they are",
    "int4": "decode reads every weight for each token: a quarter of the bytes of FP16 is up to four times the speed",
    "fp8": "half the bytes of FP16 and twice its rate; E4M3 holds outliers that INT8 must smooth",
    "nvfp4": "a quarter of the bytes of FP16; a scale for 16 weights holds more than INT4's for 32 or 128",
    "float": "left as it is",
}
VISION_REASON = "a fifteenth of the weights, run once an image: little to gain, and errors there reach every token"
HEAD_REASON = "a tenth of what decode reads; one scale a token row costs no accuracy, four bits would"
PATCH_REASON = "588 inputs, which no block divides; it reads pixels, and is a thousandth of the weights"


def default_plan(
    precision: str,
    dtype: str = "fp16",
    *,
    vision: str = "float",
    lm_head: str | None = None,
    kv_cache: str = "float",
) -> Plan:
    """The plan that a precision's name stands for: the decoder's layers in it, the rest by what it costs and gains.

    lm_head: None for int8-weight under any quantised decoder. vision: the tower's blocks and merger.
    """
    lm_head = lm_head or ("float" if precision == "float" else "int8-weight")
    for name in (precision, vision, lm_head):
        check_name(name)
    decoder_reason = _REASONS["int4" if precision in INT4_BLOCKS else precision]
    rules = (
        Rule("*", "*", "float", "what no other rule names"),
        Rule("decoder", "model.layers.*", precision, decoder_reason),
        Rule("decoder", "lm_head", lm_head, HEAD_REASON if lm_head == "int8-weight" else "as asked"),
        Rule("vision", "visual.*", vision, VISION_REASON if vision == "float" else "as asked"),
        Rule("vision", "visual.patch_embed.proj", "float", PATCH_REASON),
    )
    return Plan(precision, dtype, kv_cache, rules)
