"""onevision-edge serve as a process: its address, its key, its warnings, and its end in good order."""

import json
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from serving import data_url, question

import onevision_edge
from onevision_edge.cli.serve import serve
from onevision_edge.serve.server import listening_socket

SERVE = """
import sys
from onevision_edge.cli.serve import serve
serve(sys.argv[1:])
"""
Python = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "demo bundle"
    onevision_edge.export("demo", directory, dtype="fp32")
    return directory


def started(python: Python, bundle: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """The process once it listens, and its address."""
    process = python(SERVE, bundle, "--port", "0", "--slots", "2", *options)
    assert process.stderr is not None
    while line := process.stderr.readline():
        if found := re.search(r"at (http://\S+)", line):
            wait_until_up(found[1])
            return process, found[1]
    raise AssertionError("it ended")


def wait_until_up(address: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=10).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)


def asked(address: str, body: Any, key: str | None = None) -> Any:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=60)


def test_answers_and_ends(python: Python, bundle: Path) -> None:
    process, address = started(python, bundle, "--server-name", "proxy.example")
    assert address.startswith("http://127.0.0.1:")
    answer = json.load(asked(address, question("Which number is this?", data_url("number.png"))))
    assert (answer["choices"][0]["message"]["content"], answer["model"]) == ("6472", "demo bundle")
    urllib.request.urlopen(urllib.request.Request(f"{address}/v1/models", headers={"Host": "proxy.example"})).close()
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(f"{address}/v1/models", headers={"Host": "evil.example"}))
    assert caught.value.code == 421
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in err


def test_signal_while_answering(python: Python, bundle: Path) -> None:
    process, address = started(python, bundle, "--max-tokens", "400")
    long = question("Count.", data_url("photo.jpg"), ignore_eos=True, max_tokens=400, stream=True, n=8)
    with asked(address, long) as answer:
        answer.readline()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises(urllib.error.HTTPError) as caught:
            asked(address, question())
        assert caught.value.code == 503
        assert answer.read().decode().endswith("data: [DONE]\n\n")
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_second_signal_ends_at_once(python: Python, bundle: Path) -> None:
    process, address = started(python, bundle)
    with asked(address, question("Count.", ignore_eos=True, max_tokens=450, stream=True, n=8)) as answer:
        answer.readline()
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_key_of_the_environment(python: Python, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEVISION_EDGE_API_KEY", "secret")
    process, address = started(python, bundle, "--model-name", "m")
    assert json.load(asked(address, question(model="m", max_tokens=1), key="secret"))["model"] == "m"
    with pytest.raises(urllib.error.HTTPError) as caught:
        asked(address, question())
    assert caught.value.code == 401
    process.kill()


def test_warning_without_a_key() -> None:
    result = CliRunner().invoke(serve, ["nowhere", "--host", "0.0.0.0", "--port", "0"])
    assert "Warning: 0.0.0.0 can be reached from other machines" in result.stderr
    result = CliRunner().invoke(serve, ["nowhere", "--host", "0.0.0.0", "--port", "0", "--api-key", "k"])
    assert "Warning" not in result.stderr


@pytest.mark.parametrize(
    "options", [["--port", "70000"], ["--slots", "0"], ["--max-tokens", "x"], ["--request-seconds", "0"]]
)
def test_wrong_usage(options: list[str]) -> None:
    assert CliRunner().invoke(serve, ["nowhere", *options]).exit_code == 2


def test_failures_are_one_sentence() -> None:
    missing = CliRunner().invoke(serve, ["nowhere", "--port", "0"])
    assert isinstance(missing.exception, onevision_edge.OneVisionError)
    empty = CliRunner().invoke(serve, ["nowhere", "--port", "0", "--api-key", " "])
    assert "key is empty" in str(empty.exception)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        busy = CliRunner().invoke(serve, ["nowhere", "--port", port])
    assert f"127.0.0.1:{port} cannot be listened on" in str(busy.exception)


def test_listening_on_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        with listening_socket("::1", 0) as listening:
            assert listening.family == socket.AF_INET6
    except onevision_edge.OneVisionError:
        pytest.skip("no IPv6 address here")
