"""A bundle is there whole or not at all, and says when it has been changed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import onevision_edge
from onevision_edge.bundle import MANIFEST, Bundle, BundleWriter, writing
from onevision_edge.errors import OneVisionError

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(golden_bundle("fp32"), tmp_path / "bundle"))


def refusal(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(OneVisionError) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite_manifest(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = bundle / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


# Reading.


def test_verify_reads_every_byte(bundle: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    Bundle.open(bundle).verify(lambda *progress: seen.append(progress))
    total = sum(p.stat().st_size for p in bundle.iterdir() if p.name != MANIFEST)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == seen[-1][1] == total


def test_the_manifest_lists_every_file(bundle: Path) -> None:
    listed = Bundle.open(bundle).manifest.files
    assert {p.name for p in bundle.iterdir()} == {*listed, MANIFEST}


@pytest.mark.parametrize(
    "name", ["decoder.onnx", "decoder.onnx.data", "vision.onnx.data", "embed_tokens.bin", "config.json"]
)
def test_verify_finds_a_flipped_bit(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    assert refusal(Bundle.open(bundle).verify).endswith(f"changed since it was written: {name}")


def test_verify_names_all_that_differ(bundle: Path) -> None:
    def lie(manifest: dict[str, Any]) -> None:
        for name in ("vision.onnx", "embed_tokens.bin"):
            manifest["files"][name]["sha256"] = "0" * 64

    rewrite_manifest(bundle, lie)
    assert "vision.onnx, embed_tokens.bin" in refusal(Bundle.open(bundle).verify)


def test_a_truncated_file(bundle: Path) -> None:
    size = (bundle / "decoder.onnx.data").stat().st_size
    os.truncate(bundle / "decoder.onnx.data", size - 1)
    assert f"has {size - 1} bytes, the manifest says {size}" in refusal(Bundle.open, bundle)


def test_a_missing_file(bundle: Path) -> None:
    (bundle / "vision.onnx").unlink()
    assert "vision.onnx is missing from the bundle" in refusal(Bundle.open, bundle)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside", "..", "", "."])
def test_paths_that_leave_the_bundle(bundle: Path, name: str) -> None:
    (bundle.parent / "outside").write_bytes(b"")
    content = (bundle / MANIFEST).read_text()

    def list_file(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = {"size": 0, "sha256": ""}

    def use_as_graph(manifest: dict[str, Any]) -> None:
        manifest["graphs"]["decoder"]["file"] = name

    def use_as_table(manifest: dict[str, Any]) -> None:
        manifest["embedding"]["file"] = name

    for change in (list_file, use_as_graph, use_as_table):
        (bundle / MANIFEST).write_text(content)
        rewrite_manifest(bundle, change)
        assert f"{name!r} lies outside the bundle" in refusal(Bundle.open, bundle)


MALFORMED = "is not what this version writes"
LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no format": (lambda m: m.pop("format"), "format is None"),
    "another version": (lambda m: m.update(format_version=99), "format_version is 99"),
    "no model": (lambda m: m.pop("model"), "KeyError('model')"),
    "model without vision": (lambda m: m["model"].pop("vision"), "the model section"),
    "unknown field": (lambda m: m["model"]["text"].update(more=1), "the model section"),
    "graphs is a list": (lambda m: m.update(graphs=[]), MALFORMED),
    "graph is a number": (lambda m: m["graphs"].update(decoder=1), MALFORMED),
    "file is a list": (lambda m: m["files"].update({"a": []}), MALFORMED),
    "size is a word": (lambda m: m["files"]["vision.onnx"].update(size="big"), MALFORMED),
    "table of three axes": (lambda m: m["embedding"].update(shape=[1, 2, 3]), MALFORMED),
    "a graph not listed": (lambda m: m["files"].pop("decoder.onnx"), "decoder.onnx is used but not"),
}


@pytest.mark.parametrize(("lie", "message"), LIES.values(), ids=list(LIES))
def test_a_manifest_that_lies(bundle: Path, lie: Callable[[dict[str, Any]], Any], message: str) -> None:
    rewrite_manifest(bundle, lie)
    assert message in refusal(Bundle.open, bundle)


@pytest.mark.parametrize(
    "lie",
    [
        lambda m: m["embedding"].update(shape=[512, 65]),
        lambda m: m["embedding"].update(dtype="complex64"),
        lambda m: m["graphs"]["decoder"].update(dtype="fp8"),
        lambda m: m["graphs"]["vision"]["inputs"].pop(),
        lambda m: m["graphs"]["decoder"]["outputs"][1].update(name="x"),
    ],
    ids=["table shape", "table dtype", "graph dtype", "an input less", "an output's name"],
)
def test_a_manifest_that_lies_about_the_graphs(bundle: Path, lie: Callable[[dict[str, Any]], Any]) -> None:
    rewrite_manifest(bundle, lie)
    Bundle.open(bundle)
    refusal(onevision_edge.load, bundle, threads=1)


def test_a_manifest_that_lies_about_the_length(bundle: Path) -> None:
    rewrite_manifest(bundle, lambda m: m["limits"].update(max_length=300))
    assert "the manifest says max_length 300, the decoder's cache has ['256'] rows" in refusal(
        onevision_edge.load, bundle
    )


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("[]", "holds a JSON list")])
def test_a_broken_manifest(bundle: Path, content: str, message: str) -> None:
    (bundle / MANIFEST).write_text(content)
    assert message in refusal(Bundle.open, bundle)


def test_not_a_bundle(tmp_path: Path) -> None:
    assert "does not exist" in refusal(Bundle.open, tmp_path / "nothing")
    assert "holds no manifest.json" in refusal(Bundle.open, tmp_path)
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(Bundle.open, tmp_path / "file")


# Writing.

# Exports argv[1] to argv[2]; in the middle of the decoder's weights it says so and waits to be stopped.
EXPORT_AND_WAIT = """
import sys, time
import onevision_edge

def progress(done, total, label):
    if label.startswith("model.layers.1"):
        print("midway", flush=True)
        time.sleep(60)

options = {"dtype": "fp32", "max_length": 64, "overwrite": True}
onevision_edge.export(sys.argv[1], sys.argv[2], progress=progress, **options)
"""


@pytest.fixture
def midway(python: Start, golden_checkpoint: Path, tmp_path: Path) -> subprocess.Popen[str]:
    """An export to tmp_path/bundle that stands still in the middle of the decoder's weights."""
    process = python(EXPORT_AND_WAIT, golden_checkpoint, tmp_path / "bundle")
    assert process.stdout is not None
    assert process.stdout.readline() == "midway\n"
    return process


def test_killed_midway(midway: subprocess.Popen[str], golden_checkpoint: Path, tmp_path: Path) -> None:
    midway.send_signal(signal.SIGKILL)
    assert midway.wait(30) == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert (leftover / "vision.onnx.data").stat().st_size > 0  # it was in the middle
    for path in (leftover, tmp_path / "bundle"):
        refusal(Bundle.open, path)
    onevision_edge.export(golden_checkpoint, tmp_path / "bundle", dtype="fp32", max_length=64)
    Bundle.open(tmp_path / "bundle").verify()
    assert list(tmp_path.iterdir()) == [tmp_path / "bundle"]


def test_killed_midway_over_an_older_bundle(
    python: Start, golden_checkpoint: Path, golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(golden_bundle("fp32"), tmp_path / "bundle")
    process = python(EXPORT_AND_WAIT, golden_checkpoint, tmp_path / "bundle")
    assert process.stdout is not None
    assert process.stdout.readline() == "midway\n"
    process.kill()
    process.wait(30)
    Bundle.open(tmp_path / "bundle").verify()


def test_interrupted(midway: subprocess.Popen[str], tmp_path: Path) -> None:
    midway.send_signal(signal.SIGINT)
    _, err = midway.communicate(timeout=30)
    assert midway.returncode != 0
    assert err.strip().endswith("KeyboardInterrupt")
    assert list(tmp_path.iterdir()) == []


def test_two_exports_to_one_place(midway: subprocess.Popen[str], golden_checkpoint: Path, tmp_path: Path) -> None:
    message = refusal(onevision_edge.export, golden_checkpoint, tmp_path / "bundle", dtype="fp32", max_length=64)
    assert "another process is writing this bundle" in message
    assert midway.poll() is None
    (leftover,) = tmp_path.iterdir()
    assert (leftover / "vision.onnx.data").stat().st_size > 0  # the first one's files are untouched


def test_two_threads_write_to_one_place(tmp_path: Path) -> None:
    with writing(tmp_path / "bundle") as writer:
        writer.path(MANIFEST).write_text("{}")
        messages: list[str] = []

        def second() -> None:
            with writing(tmp_path / "bundle"):
                pass

        thread = threading.Thread(target=lambda: messages.append(refusal(second)))
        thread.start()
        thread.join()
        assert "another process is writing" in messages[0]
    assert (tmp_path / "bundle" / MANIFEST).read_text() == "{}"


def test_a_bundle_that_appeared_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finishes between our look at the destination and our turn to write."""
    target = tmp_path / "bundle"
    real_mkdir = Path.mkdir

    def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == ".bundle.partial" and not target.exists():
            real_mkdir(target)
            (target / MANIFEST).write_text("theirs")
        real_mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)

    def write() -> None:
        with writing(target) as writer:
            writer.path(MANIFEST).write_text("ours")

    assert "pass --overwrite" in refusal(write)
    assert (target / MANIFEST).read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_the_next_writer_keeps_its_files(tmp_path: Path) -> None:
    """Once the first has renamed its directory, the name it used belongs to whoever comes next."""
    target, staging = tmp_path / "bundle", tmp_path / ".bundle.partial"
    real_rename = os.rename

    def rename(source: Any, destination: Any) -> None:
        real_rename(source, destination)
        if Path(source) == staging:
            staging.mkdir()
            (staging / "theirs").write_text("")

    with pytest.MonkeyPatch.context() as patch, writing(target) as writer:
        writer.path(MANIFEST).write_text("{}")
        patch.setattr(os, "rename", rename)
    assert (staging / "theirs").exists()


def test_an_error_while_replacing_restores_the_old_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_rename = os.rename

    def rename(source: Any, destination: Any) -> None:
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        real_rename(source, destination)

    monkeypatch.setattr(os, "rename", rename)

    def write() -> None:
        with writing(bundle, overwrite=True) as writer:
            writer.path(MANIFEST).write_text("{}")

    assert "cannot be written: Input/output error" in refusal(write)
    Bundle.open(bundle).verify()
    assert list(bundle.parent.iterdir()) == [bundle]


def test_a_failure_inside_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with writing(tmp_path / "bundle") as writer:
            writer.path("vision.onnx").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_parent_should_be(golden_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "bundle", tmp_path / "file" / "deeper" / "bundle"):
        message = refusal(onevision_edge.export, golden_checkpoint, output, dtype="fp32", max_length=64)
        assert f"{output}: cannot be written: " in message
        assert message.endswith(" is not a directory")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# Full disks: a file system of 1.2 MB for a bundle of 1.8 MB.


@pytest.fixture
def small_disk(mounted: Callable[[str], Path]) -> Path:
    return mounted("1200k")


def test_a_disk_known_to_be_too_small(golden_checkpoint: Path, small_disk: Path) -> None:
    message = refusal(onevision_edge.export, golden_checkpoint, small_disk / "bundle", dtype="fp32", max_length=64)
    assert "the bundle needs 1.8 MB, the disk has 1.2 MB free" in message
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("filled", [0, 300, 1100, 1190])
def test_a_disk_that_fills_up(
    golden_checkpoint: Path, small_disk: Path, filled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the look ahead, at several points: in either graph's weights, in the very first file."""
    monkeypatch.setattr("onevision_edge.bundle._check_space", lambda *_: None)
    (small_disk / "other").write_bytes(bytes(filled * 1024))
    message = refusal(onevision_edge.export, golden_checkpoint, small_disk / "bundle", dtype="fp32", max_length=64)
    assert "the disk is full" in message
    assert list(small_disk.iterdir()) == [small_disk / "other"]


@pytest.mark.parametrize("name", ["vision.onnx", "decoder.onnx", "config.json", MANIFEST])
def test_a_disk_full_at_any_file(
    golden_checkpoint: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device that is always full stands in for one of the files."""
    monkeypatch.setattr(BundleWriter, "path", _full_device(name, BundleWriter.path))
    message = refusal(onevision_edge.export, golden_checkpoint, tmp_path / "bundle", dtype="fp32", max_length=64)
    assert "the disk is full" in message
    assert list(tmp_path.iterdir()) == []


def _full_device(name: str, path: Callable[[Any, str], Path]) -> Callable[[Any, str], Path]:
    return lambda writer, file: Path("/dev/full") if file == name else path(writer, file)
