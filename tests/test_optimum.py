"""optimum-cli export onevision, run by optimum's own command from a folder of its register namespace."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

import onevision_edge
from onevision_edge.bundle import Bundle

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def optimum(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs optimum-cli export onevision, our registration where an installation puts it, once."""
    if not _found("optimum.commands.optimum_cli"):
        pytest.skip("optimum is not installed: pip install 'onevision-edge[optimum]'")
    paths = [p for p in sys.path if p]
    if not _found("optimum.commands.register.register_onevision"):
        place = tmp_path_factory.mktemp("installed") / "optimum" / "commands" / "register"
        source = Path(onevision_edge.__file__).parent / "serve" / "optimum_register"
        shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
        paths.insert(0, str(place.parents[2]))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        program = "from optimum.commands.optimum_cli import main; main()"
        command = [sys.executable, "-c", program, "export", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    return run


def _found(module: str) -> bool:
    """Whether a module is installed. Our registration alone makes optimum.commands, but nothing in it."""
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


def test_the_export_is_where_optimum_lists_exports(optimum: Run) -> None:
    done = optimum("--help")
    assert done.returncode == 0, done.stderr
    assert "onevision" in done.stdout
    assert "--max-length" in optimum("onevision", "--help").stdout


def test_a_bundle_is_written_as_by_our_own_command(optimum: Run, golden_checkpoint: Path, tmp_path: Path) -> None:
    done = optimum(
        "onevision", "--model", golden_checkpoint, "--dtype", "fp32", "--max-length", 256, tmp_path / "bundle"
    )
    assert done.returncode == 0, done.stderr
    own = onevision_edge.export(golden_checkpoint, tmp_path / "own", dtype="fp32", max_length=256)
    assert Bundle.open(tmp_path / "bundle").manifest.files == own.manifest.files
    assert "wrote" in done.stderr


@pytest.mark.slow
def test_a_precision_quantises(optimum: Run, tmp_path: Path) -> None:
    done = optimum("onevision", "-m", "demo", "--precision", "int8-weight", "--dtype", "fp32", tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    assert Bundle.open(tmp_path / "bundle").manifest.graphs["decoder"].weights["int8"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("-m", "missing-directory/x/y", "out"), 1, "Error: missing-directory/x/y"),
        (("-m", "demo", "--max-length", "0", "out"), 2, "'0' is not a whole number from 1"),
        (("out",), 2, "-m/--model"),
    ],
)
def test_mistakes_are_one_line(optimum: Run, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = optimum("onevision", *arguments)
    assert done.returncode == code
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_package_needs_no_optimum() -> None:
    program = "import sys, onevision_edge, onevision_edge.cli; assert 'optimum' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
