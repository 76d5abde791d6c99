"""Gates: how sections add up, and that what is unknown is named."""

from pathlib import Path

import pytest

from onevision_edge.errors import OneVisionError
from onevision_edge.report.parity.gates import PRECISIONS, load_gates

FILE = """
[default]
preprocess = 1e-6
divergent_rows = 0.3
required = ["kld"]
error."*" = 0.5
error."logits" = 0.1
at_most = { kld = 0.05, cer = 0.2 }
worse_by = { accuracy = 0.02 }
[int8]
divergent_rows = 0.1
error."*" = 0.25
error."vision.blocks.*" = 0.2
own."decoder.layers.[12]" = 0.05
at_most.kld = 0.01
"""


@pytest.fixture
def write(tmp_path: Path):  # type: ignore[no-untyped-def]
    def written(text: str) -> Path:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return path

    return written


def test_a_precisions_limits_add_to_the_default(write) -> None:  # type: ignore[no-untyped-def]
    gates = load_gates(write(FILE))
    found, default = gates.of("int8"), gates.of("fp8")
    assert (found.name, default.name, found.source) == ("int8", "default", "mine.toml")
    assert found.at_most == {"kld": 0.01, "cer": 0.2}
    assert default.at_most == {"kld": 0.05, "cer": 0.2}
    assert (found.divergent_rows, found.preprocess, found.noise_factor) == (0.1, 1e-6, 3.0)
    assert (found.required, found.margin("accuracy"), found.margin("anls")) == (("kld",), 0.02, 0.0)


def test_the_last_pattern_that_matches_decides(write) -> None:  # type: ignore[no-untyped-def]
    gates = load_gates(write(FILE))
    found = gates.of("int8")
    limits = [found.limit("error", stage) for stage in ("vision.blocks.11", "merger", "logits")]
    assert limits == [0.2, 0.25, 0.25]
    assert gates.of("fp32").limit("error", "logits") == 0.1
    own = [found.limit("own", f"decoder.layers.{i}") for i in (1, 2, 3, 12)]
    assert own == [0.05, 0.05, None, None]


def test_the_shipped_gates_have_every_precision() -> None:
    gates = load_gates()
    assert gates.source == "parity-gates.toml"
    assert set(gates.sections) == {"default", *PRECISIONS}
    looser = ["fp32", "fp16", "bf16", "int8-weight", "int8", "int4"]
    for key in ("kld", "kld_p99"):
        limits = [gates.of(name).at_most[key] for name in looser]
        assert limits == sorted(limits)
    for kind in ("error", "own"):
        limits = [gates.of(name).limit(kind, "decoder.layers.3") for name in looser]
        assert limits == sorted(limits)  # type: ignore[type-var]
    assert gates.of("anything else") == gates.of("default")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[int6]\n", "'int6' is no known section; known are default, fp32"),
        ("kld = 1\n", "'kld' is no known section"),
        ("int8 = 1\n", r"int8 is 1; it must be a section"),
        ("[int8]\nkdl = 1\n", r"'kdl' is no known key of \[int8\]; known are preprocess"),
        ("[int8]\nat_most.kdl = 1\n", r"'kdl' is no known metric of \[int8\] at_most; known are kld"),
        ("[int8]\nworse_by.accuracy_reference = 1\n", "'accuracy_reference' is no known metric"),
        ("[int8]\nrequired = ['kdl']\n", "'kdl' is no known metric"),
        ("[int8]\nrequired = 1\n", "must be a list of metrics"),
        ("[int8]\nat_most = 1\n", "must be a table"),
        ("[int8]\nat_most.kld = true\n", r"\[int8\] at_most kld is True; it must be a number from 0"),
        ("[int8]\nat_most.kld = nan\n", "is nan; it must be a number from 0"),
        ("[int8]\nnoise_factor = -1\n", "is -1; it must be a number from 0"),
        ("[int8]\nerror.'vison.*' = 1\n", r"\[int8\] error has 'vison.\*', which matches no stage"),
        ("[int8\n", "is not TOML"),
    ],
)
def test_what_is_unknown_is_named(write, text: str, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OneVisionError, match=f"mine.toml: .*{message}"):
        load_gates(write(text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OneVisionError, match="cannot be read: No such file"):
        load_gates(tmp_path / "none.toml")
