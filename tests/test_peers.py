"""Peers: what stands in for the tower, what is refused, and transformers' own decoder where it is installed."""

import importlib.util
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from onevision_edge.errors import OneVisionError
from onevision_edge.report.latency import peers
from onevision_edge.report.latency.cells import Cell
from onevision_edge.report.latency.peer_engines import _precision
from onevision_edge.report.latency.peers import PEERS, PeerRunner, peer_contender
from onevision_edge.report.subject import Subject
from onevision_edge.runtime.model import Model


class Echo:
    """Says the number of tokens that it has read."""

    vocab_size = 50

    def __init__(self) -> None:
        self.calls: list[Sequence[int]] = []

    def forget(self) -> None:
        self.calls = []

    def read(self, ids: Sequence[int]) -> int:
        self.calls.append(ids)
        return sum(map(len, self.calls))

    def describe(self, name: str) -> Subject:
        return Subject(name, "checkpoint", "echo", "int4", "mixed", 1, None, {}, {}, ("4 bits",))


def test_text_stands_in_for_images() -> None:
    echo, cell = Echo(), Cell((56, 56), 3, 4)
    clock = map(float, count())
    found = PeerRunner("peer", echo, {cell.name: 9}).request(cell, 0, lambda: next(clock))
    assert [len(ids) for ids in echo.calls] == [12, 1, 1, 1]
    assert [list(ids) for ids in echo.calls[1:]] == [[12], [13], [14]]  # what it said is read next
    assert found.input_tokens == 12
    assert found.tokens == [[1, 2, 3, 4]]
    assert found.stages == {"prefill": 1, "decode": 3}
    notes = PeerRunner("peer", echo, {}).subject([cell])["notes"]
    assert notes == ["4 bits", "text in place of images: it has no tower here"]
    assert PeerRunner("peer", echo, {}).subject([Cell(None, 3, 4)])["notes"] == ["4 bits"]


def test_peers_take_one_sequence_and_tell_no_profile() -> None:
    runner = PeerRunner("peer", Echo(), {})
    with pytest.raises(OneVisionError, match="leave --batch at 1"):
        runner.request(Cell(None, 3, 4, 2), 0)
    with pytest.raises(OneVisionError, match="no access"):
        runner.profile(Cell(None, 3, 4), 0)


def test_a_peer_that_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(OneVisionError, match=r"^llama.cpp is not installed here \(no llama_cpp\): pip"):
        peer_contender("llama.cpp=x.gguf", "llama.cpp", 1, {})


@pytest.mark.parametrize("option", ["vllm=x", "transformers", "transformers=", "=x"])
def test_unknown_peers_are_refused(option: str) -> None:
    with pytest.raises(OneVisionError, match=r"give transformers=PATH, llama\.cpp=PATH, openvino=PATH"):
        peer_contender(option, "peer", 1, {})


def test_a_path_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: SimpleNamespace())
    with pytest.raises(OneVisionError, match="does not exist"):
        peer_contender(f"openvino={tmp_path / 'none'}", "openvino", 1, {})
    found = peer_contender(f"openvino={tmp_path}", "openvino (2)", 1, {"cell": 3})
    assert (found.name, found.kind) == ("openvino (2)", "openvino")
    assert found.arguments == (str(tmp_path), "openvino (2)", 1, {"cell": 3})


def test_what_a_peer_raises_becomes_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def reader(path: str, threads: int) -> Echo:
        raise RuntimeError("no such tensor\nand much more")

    peer = peers.Peer("echo", (), "echo", reader)
    with pytest.raises(OneVisionError, match=r"^echo cannot load x: RuntimeError: no such tensor$"):
        peer.load("x", "echo")


def test_precisions_of_gguf_files_are_read() -> None:
    kinds = ("qwen3 4B Q4_0", "qwen3 4B Q8_0", "qwen3 4B BF16", "qwen3 4B F16", "qwen3 4B all F32", "qwen3 4B IQ2_XXS")
    assert [_precision(kind) for kind in kinds] == ["int4", "int8-weight", "bf16", "fp16", "fp32", "mixed"]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_transformers_reads_the_text_half(golden_checkpoint: Path, golden_model: Model) -> None:
    """Greedy tokens of the golden checkpoint, FP32, are those of our FP32 bundle."""
    runner = PEERS["transformers"].load(str(golden_checkpoint), "transformers", 1)
    ids = [3, 14, 15, 92, 65]
    runner.reader.forget()
    said, given = [], ids
    for _ in range(6):
        given = [runner.reader.read(given)]
        said += given
    ours = golden_model.generate_ids(np.array([ids]), max_tokens=6, eos_token_id=[])
    assert said == ours[0].tolist()
    found = runner.subject([])
    assert (found["kind"], found["dtype"], found["precision"]) == ("transformers", "fp32", "fp32")
    assert found["model"] == {"vision_depth": 0, "layers": 3, "hidden_size": 64, "vocab_size": 512}
    request = runner.request(Cell(None, 5, 4), 0)
    assert [len(times) for times in request.tokens] == [4]
