"""What this package knows of the CPU, from the kernel's files: flags, the name, cores behind threads."""

import os
import platform
from pathlib import Path

import pytest

from onevision_edge.runtime import kernels, processor
from onevision_edge.runtime.processor import cpu_flags, cpu_name, machine, physical_cores

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse2 avx2 fma avx512f avx512_vnni
vmx flags\t: vnmi ept

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 asimddp
CPU implementer\t: 0x41
"""


@pytest.mark.parametrize(
    ("text", "flags", "name"),
    [
        (
            X86,
            {"fpu", "sse2", "avx2", "fma", "avx512f", "avx512_vnni"},
            "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
        ),
        (ARM, {"fp", "asimd", "evtstrm", "crc32", "asimddp"}, None),
        ("", set(), None),
        ("flags\n", set(), None),
    ],
    ids=["x86", "arm", "empty", "cut"],
)
def test_flags_and_name_are_those_of_the_first_processor(
    tmp_path: Path, text: str, flags: set[str], name: str | None
) -> None:
    """Where there is no name, the architecture stands for it."""
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert cpu_flags(file) == flags
    assert cpu_name(file) == (name or machine())


def test_without_the_kernels_file(tmp_path: Path) -> None:
    assert cpu_flags(tmp_path / "none") == frozenset()
    assert cpu_name(tmp_path / "none") == machine()


@pytest.mark.parametrize(
    ("told", "name"),
    [("x86_64", "x86_64"), ("AMD64", "x86_64"), ("arm64", "aarch64"), ("aarch64", "aarch64"), ("riscv64",) * 2],
)
def test_architectures_have_one_name(monkeypatch: pytest.MonkeyPatch, told: str, name: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: told)
    assert machine() == name


def siblings(root: Path, *groups: str) -> Path:
    """Files that name the threads of each processor's core: "0-1" or "0,2"."""
    for cpu, group in enumerate(groups):
        folder = root / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{group}\n")
    return root


@pytest.mark.parametrize(
    ("groups", "allowed", "cores"),
    [
        (("0-1", "0-1", "2-3", "2-3"), {0, 1, 2, 3}, 2),
        (("0,2", "1,3", "0,2", "1,3"), {0, 1, 2, 3}, 2),
        (("0", "1", "2", "3"), {0, 1, 2, 3}, 4),
        (("0-1", "0-1", "2-3", "2-3"), {1, 2}, 2),
        (("0-1", "0-1", "2-3", "2-3"), {2, 3}, 1),
        ((), {0, 1, 2}, 3),
        (("0-1",), {0, 5}, 2),
    ],
)
def test_cores_are_counted_once_and_only_those_that_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: tuple[str, ...], allowed: set[int], cores: int
) -> None:
    """Processors whose core is not told count as one each."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed, raising=False)
    assert physical_cores(siblings(tmp_path, *groups)) == cores


def test_systems_that_bind_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert physical_cores(siblings(tmp_path, "0-1", "0-1", "2-3", "2-3")) == 2
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert physical_cores(tmp_path) == 1


def test_this_machine() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
    assert cpu_name()
    assert processor.machine() == processor.machine().lower()


@pytest.mark.parametrize(
    ("architecture", "flags", "levels"),
    [
        ("x86_64", "", ["sse2"]),
        ("x86_64", "avx2 fma bmi1 bmi2 f16c movbe abm", ["avx2", "sse2"]),
        ("x86_64", "avx2 fma bmi1 bmi2 f16c movbe", ["sse2"]),
        (
            "x86_64",
            "avx2 fma bmi1 bmi2 f16c movbe abm avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni",
            ["avx512-vnni", "avx2", "sse2"],
        ),
        ("aarch64", "asimd asimddp", ["dotprod", "neon"]),
        ("aarch64", "asimd", ["neon"]),
        ("riscv64", "", []),
    ],
)
def test_levels_are_what_the_flags_allow(
    monkeypatch: pytest.MonkeyPatch, architecture: str, flags: str, levels: list[str]
) -> None:
    """The best first, and each can do what the next one can."""
    monkeypatch.setattr(kernels, "machine", lambda: architecture)
    monkeypatch.setattr(kernels, "cpu_flags", lambda: frozenset(flags.split()))
    assert [level.name for level in kernels.levels()] == levels
