"""Engine records: what is read back, and engines that cannot run here, refused before they are loaded."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onevision_edge.bundle import Bundle
from onevision_edge.engines.dialects import RTX, TENSORRT
from onevision_edge.engines.profiles import profiles
from onevision_edge.engines.record import (
    ENGINES,
    RECORD,
    EngineRecord,
    EngineSet,
    check_engine,
    engine_folders,
    file_sha256,
    read_header,
    read_set,
    source_digests,
)
from onevision_edge.errors import OneVisionError

VERSION = "1.7.1.116"
HERE = {"engine": "tensorrt-rtx", "version": VERSION}


def plan_file(version: str = VERSION, bits: int = 0b0110, body: bytes = b"weights") -> bytes:
    """Bytes with the header of a TensorRT-RTX engine, for sm80 and sm86."""
    size = (64 + len(body)).to_bytes(8, "little")
    numbers = bytes(map(int, version.split(".")))
    return b"vtrt" + bytes(4) + b"\2" + bytes(7) + size + numbers + b"vtrt" + bytes([bits]) + bytes(31) + body


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Bundle:
    shutil.copytree(golden_bundle("fp16"), tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


@pytest.fixture
def folder(bundle: Bundle) -> Path:
    """The engines of a bundle, for sm80 and sm86, with a file that has an engine's header and nothing else."""
    folder = bundle.directory / ENGINES / "sm80+sm86"
    folder.mkdir(parents=True)
    (folder / "decoder.engine").write_bytes(plan_file())
    write(folder, record_of(bundle, folder))
    return folder


def record_of(bundle: Bundle, folder: Path) -> EngineSet:
    (wide,) = profiles(bundle.manifest, max_pixels=448 * 448)
    file = folder / "decoder.engine"
    engine = EngineRecord(
        file.name,
        file.stat().st_size,
        file_sha256(file),
        source_digests(bundle, ["decoder.onnx", "decoder.onnx.data"]),
        {wide.name: wide.limits()},
        1.5,
        300_000_000,
        {"ATTENTION_INPUT": 3},
    )
    return EngineSet(
        "tensorrt-rtx",
        VERSION,
        "sm80+sm86",
        ("sm80", "sm86"),
        {},
        "onevision-edge build BUNDLE --target sm80,sm86 --overwrite",
        {"engine_bytes": 1},
        {"decoder": engine},
    )


def write(folder: Path, record: EngineSet) -> None:
    (folder / RECORD).write_text(json.dumps(record.to_dict()))


def changed(folder: Path, **changes: Any) -> None:
    """Change fields of the record, those of its engine too."""
    record = read_set(folder)
    own = {name: value for name, value in changes.items() if name in EngineSet.__dataclass_fields__}
    other = {name: value for name, value in changes.items() if name not in own}
    engines = {part: replace(engine, **other) for part, engine in record.engines.items()}
    write(folder, replace(record, engines=engines, **own))


def refused(bundle: Bundle, folder: Path, **here: Any) -> str:
    """The refusal of an engine: one line, with the command that builds it again."""
    with pytest.raises(OneVisionError) as refusal:
        check_engine(bundle, folder, "decoder", **(HERE | here))
    message = str(refusal.value)
    assert "\n" not in message
    assert message.endswith(f"; build it again: onevision-edge build {bundle.directory} --target sm80,sm86 --overwrite")
    return message


def test_a_record_is_read_as_written(bundle: Bundle, folder: Path) -> None:
    assert read_set(folder) == record_of(bundle, folder)
    assert engine_folders(bundle) == [folder]
    assert read_set(folder).engines["decoder"].limits["tokens"] == {"min": 1, "opt": 1, "max": 256}


def test_an_engine_that_runs_is_given(bundle: Bundle, folder: Path) -> None:
    path, record = check_engine(bundle, folder, "decoder", **HERE, capability="sm86", verify=True)
    assert path == folder / "decoder.engine"
    assert record.capabilities == ("sm80", "sm86")


def test_engines_do_not_disturb_the_bundle(bundle: Bundle, folder: Path) -> None:
    Bundle.open(bundle.directory).verify()
    (folder / RECORD).write_text("{")
    Bundle.open(bundle.directory)


def test_what_is_being_written_is_no_engine(bundle: Bundle, folder: Path) -> None:
    shutil.copytree(folder, folder.parent / ".sm89.partial")
    assert engine_folders(bundle) == [folder]


# Records


def test_no_record(folder: Path) -> None:
    (folder / RECORD).unlink()
    with pytest.raises(OneVisionError, match=r"holds no engine.json: build its engines with onevision-edge build"):
        read_set(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": "onevision-edge engines", "format_version": 1}', '{"format": "x"}', "{" * 9]
)
def test_records_that_are_none(folder: Path, text: str) -> None:
    (folder / RECORD).write_text(text)
    with pytest.raises(OneVisionError) as refusal:
        read_set(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("file", "../../vision.onnx.data"),
        ("profiles", {}),
        ("profiles", {"wide": {"tokens": {"min": 2, "opt": 1, "max": 1}}}),
        ("size", "many"),
        ("sources", {"decoder.onnx": {}}),
        ("layers", []),
    ],
)
def test_records_that_do_not_make_sense(folder: Path, field: str, value: Any) -> None:
    raw = json.loads((folder / RECORD).read_text())
    raw["engines"]["decoder"][field] = value
    (folder / RECORD).write_text(json.dumps(raw))
    with pytest.raises(OneVisionError, match=r"is not what this version writes .*: build the engines again"):
        read_set(folder)


def test_an_unknown_kind_of_engine(folder: Path) -> None:
    changed(folder, engine="onnxruntime")
    with pytest.raises(OneVisionError, match="is not what this version writes"):
        read_set(folder)


def test_a_part_that_was_not_built(bundle: Bundle, folder: Path) -> None:
    with pytest.raises(OneVisionError, match="has no vision engine, only decoder; build it again: "):
        check_engine(bundle, folder, "vision", **HERE)


# Files


def test_no_file(bundle: Bundle, folder: Path) -> None:
    (folder / "decoder.engine").unlink()
    assert "decoder.engine is missing" in refused(bundle, folder)


def test_a_file_that_was_cut(bundle: Bundle, folder: Path) -> None:
    data = plan_file()
    (folder / "decoder.engine").write_bytes(data[:-1])
    assert f"has {len(data) - 1} bytes, its record says {len(data)}: it was cut or replaced" in refused(bundle, folder)


def test_a_file_cut_with_its_record(bundle: Bundle, folder: Path) -> None:
    data = plan_file()
    (folder / "decoder.engine").write_bytes(data[:-1])
    changed(folder, size=len(data) - 1)
    assert f"has {len(data) - 1} bytes, its header says {len(data)}" in refused(bundle, folder)


def test_a_changed_byte_shows_where_it_is_looked_for(bundle: Bundle, folder: Path) -> None:
    (folder / "decoder.engine").write_bytes(plan_file(body=b"Weights"))
    check_engine(bundle, folder, "decoder", **HERE)
    assert "has changed since it was built: its sha256 is not its record's" in refused(bundle, folder, verify=True)


@pytest.mark.parametrize("data", [b"ftrt" + plan_file()[4:], bytes(71), plan_file()[:28] + b"xxxx" + plan_file()[32:]])
def test_a_file_that_is_no_engine(bundle: Bundle, folder: Path, data: bytes) -> None:
    (folder / "decoder.engine").write_bytes(data)
    assert "is not a TensorRT-RTX engine" in refused(bundle, folder)


def test_a_short_file_has_no_header() -> None:
    assert read_header(plan_file()[:63]) is None
    assert read_header(b"") is None


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (plan_file(version="1.6.0.9"), "its header says version 1.6.0.9, its record says 1.7.1.116"),
        (plan_file(bits=0b1000), "its header says compute capabilities sm89, its record says sm80, sm86"),
    ],
)
def test_a_record_that_lies(bundle: Bundle, folder: Path, data: bytes, told: str) -> None:
    (folder / "decoder.engine").write_bytes(data)
    assert told in refused(bundle, folder)


# What is here


def test_another_version(bundle: Bundle, folder: Path) -> None:
    assert "was built by TensorRT-RTX 1.7.1.116, and 1.8.0.5 is installed here" in refused(
        bundle, folder, version="1.8.0.5"
    )


def test_another_library(bundle: Bundle, folder: Path) -> None:
    assert "is an engine of TensorRT-RTX, not of tensorrt" in refused(bundle, folder, engine="tensorrt")


@pytest.mark.parametrize("capability", ["sm75", "sm89", "sm87"])
def test_another_gpu(bundle: Bundle, folder: Path, capability: str) -> None:
    told = f"was built for sm80, sm86, and this GPU is {capability}"
    assert told in refused(bundle, folder, capability=capability)


@pytest.mark.parametrize(
    ("options", "version", "capability", "runs"),
    [
        ({}, "10.15.1.2", "sm87", True),
        ({}, "10.15.1.3", "sm87", False),
        ({"versionCompatible": True}, "11.4.0.106", "sm87", True),
        ({"versionCompatible": True}, "10.14.0.1", "sm87", False),
        ({}, "10.15.1.2", "sm90", False),
        ({"hardwareCompatibilityLevel": "ampere+"}, "10.15.1.2", "sm90", True),
        ({"hardwareCompatibilityLevel": "ampere+"}, "10.15.1.2", "sm120", True),
        ({"hardwareCompatibilityLevel": "ampere+"}, "10.15.1.2", "sm75", False),
        ({"hardwareCompatibilityLevel": "sameComputeCapability"}, "10.15.1.2", "sm90", False),
    ],
)
def test_tensorrt_engines_run_where_their_options_let_them(
    bundle: Bundle, folder: Path, options: dict[str, Any], version: str, capability: str, runs: bool
) -> None:
    """Its header is not documented, and not read."""
    changed(folder, engine="tensorrt", version="10.15.1.2", capabilities=("sm87",), options=options)
    here = {"engine": TENSORRT.name, "version": version, "capability": capability}
    if runs:
        check_engine(bundle, folder, "decoder", **here)
    else:
        refused(bundle, folder, **here)


# The bundle


def test_a_bundle_that_was_exported_again(bundle: Bundle, folder: Path, golden_bundle: Callable[[str], Path]) -> None:
    other = Bundle.open(golden_bundle("fp32"))
    assert "was built of another decoder.onnx than the bundle holds" in refused(
        Bundle(bundle.directory, other.manifest), folder
    )


def test_a_graph_that_is_not_the_manifests(bundle: Bundle) -> None:
    path = bundle.directory / "decoder.onnx.data"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(OneVisionError, match="has changed since the bundle was written; export or copy it again"):
        source_digests(bundle, ["decoder.onnx.data"])


def test_capabilities_in_a_header_are_bits_in_order() -> None:
    """As TensorRT-RTX 1.7.1 wrote them; real engines are held against this in tests/test_build.py."""
    for i, name in enumerate(RTX.capabilities or ()):
        header = read_header(plan_file(bits=1 << i))
        assert header is not None
        assert header.capabilities == (name,)
