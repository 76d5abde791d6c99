"""A bundle on Ray: replicas behind one door, one of them killed under load, and rows answered offline.

One cluster of two CPUs for the module, 40 seconds in all.
"""

import base64
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest

import onevision_edge
from onevision_edge.errors import OneVisionError
from onevision_edge.runtime.model import Model, load
from onevision_edge.runtime.sampling import SamplingParams
from onevision_edge.serve.batch import BatchOptions, Cluster, run_batch
from onevision_edge.serve.settings import Settings

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'onevision-edge[ray]'")
pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'onevision-edge[ray]'")

from onevision_edge.serve.ray_app import APP, RayOptions, application, build  # noqa: E402

pytestmark = pytest.mark.slow
DEMO = Path(onevision_edge.__file__).parent / "demo"
FINISHED = "onevision_edge_request_seconds_count"
QUESTIONS = json.loads((DEMO / "images" / "questions.json").read_text())


@dataclass(frozen=True)
class Served:
    """A running application, and the model that it serves."""

    url: str
    model: Model
    bundle: Path

    def ask(self, messages: list[Any], headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
        body = {"model": "onevision", "messages": messages, "max_tokens": 24, **more}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=60)

    def text(self, messages: list[Any]) -> str:
        return str(self.model.generate(messages, max_tokens=24))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        patch.setenv("OPENBLAS_NUM_THREADS", "1")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def served(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from ray import serve

    bundle = tmp_path_factory.mktemp("demo") / "bundle"
    onevision_edge.export("demo", bundle, dtype="fp32", max_length=512)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = RayOptions(replicas=2, slots=4, cpus=0.5, threads=1)
    serve.run(application(bundle, Settings(), options), name=APP)
    yield Served(f"http://127.0.0.1:{port}", load(bundle, threads=1), bundle)
    serve.shutdown()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def question(index: int) -> list[dict[str, Any]]:
    """One of the shipped questions, as a client asks it."""
    asked = QUESTIONS[index % len(QUESTIONS)]
    items = [{"type": "image_url", "image_url": {"url": data_url(name)}} for name in asked["images"]]
    return [{"role": "user", "content": [*items, {"type": "text", "text": asked["prompt"]}]}]


def data_url(name: str) -> str:
    kind = "jpeg" if name.endswith("jpg") else "png"
    return f"data:image/{kind};base64," + base64.b64encode((DEMO / "images" / name).read_bytes()).decode()


def answer(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def replicas() -> dict[str, Any]:
    """The actors of the model's replicas that are alive, by name."""
    found = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if "#model#" in actor["name"]:
            found[actor["name"]] = ray.get_actor(actor["name"], namespace=actor["namespace"])
    return found


def test_answers_are_the_models(served: Served) -> None:
    for index in range(len(QUESTIONS)):
        assert answer(served.ask(question(index))) == served.text(question(index))


def test_a_stream_joins_to_the_answer(served: Served) -> None:
    response = served.ask(question(0), stream=True)
    events = [line.removeprefix("data: ") for line in response.text.strip().split("\n\n")]
    assert events.pop() == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events]
    assert len(pieces) > 5
    assert "".join(pieces) == served.text(question(0))


def test_other_addresses_and_mistakes_pass_through(served: Served) -> None:
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{served.url}/v1/models").json()["data"][0]["id"] == "onevision"
    assert httpx.get(f"{served.url}/nothing").status_code == 404
    refused = served.ask([])
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_conversation_goes_on_where_its_cache_is(served: Served) -> None:
    rows = [json.loads(line) for line in (DEMO / "evaluation" / "questions.jsonl").read_text().splitlines()]
    images = list(dict.fromkeys(row["image"] for row in rows if isinstance(row.get("image"), str)))[:12]
    for name in images:
        data = base64.b64encode((DEMO / "evaluation" / name).read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        first = [{"role": "user", "content": [image, {"type": "text", "text": "What is in the image?"}]}]
        said = served.ask(first).json()
        assert said["usage"]["prompt_tokens_details"]["cached_image_tokens"] == 0
        reply = {"role": "assistant", "content": said["choices"][0]["message"]["content"]}
        used = served.ask([*first, reply, {"role": "user", "content": "And what color?"}]).json()["usage"]
        assert used["prompt_tokens_details"]["cached_tokens"] >= said["usage"]["prompt_tokens"]
        assert used["prompt_tokens_details"]["cached_image_tokens"] == used["prompt_tokens_details"]["image_tokens"]


def test_both_replicas_work(served: Served) -> None:
    with ThreadPoolExecutor(8) as clients:
        list(clients.map(lambda i: served.ask([{"role": "user", "content": f"Say {i}"}]), range(40)))
    assert len({finished(served) for _ in range(20)}) == 2  # the pages of two replicas, which are asked in turn
    assert min(finished(served) for _ in range(20)) >= 5


def finished(served: Served) -> float:
    """Requests that the replica which answers has finished, by its metrics."""
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(FINISHED))


def test_a_replica_killed_under_load_loses_nothing_and_nothing_is_answered_twice(served: Served) -> None:
    wanted = [served.text(question(i)) for i in range(len(QUESTIONS))]
    count, done = 200, threading.Semaphore(0)
    victim_name, victim = sorted(replicas().items())[0]

    def one(index: int) -> tuple[int, str, str]:
        response = served.ask(question(index), headers={"X-Request-Id": f"load-{index}"})
        done.release()
        return index, answer(response), response.json()["id"]

    with ThreadPoolExecutor(8) as clients:
        running = [clients.submit(one, index) for index in range(count)]
        for _ in range(40):
            done.acquire()
        ray.kill(victim)
        found = [future.result() for future in running]
    assert [text for _, text, _ in found] == [wanted[i % len(wanted)] for i in range(count)]
    assert len({identity for _, _, identity in found}) == count
    again = [one(index)[2] for index in range(0, count, 20)]
    assert again == [found[index][2] for index in range(0, count, 20)]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and (len(replicas()) < 2 or victim_name in replicas()):
        time.sleep(0.2)
    assert len(replicas()) == 2


def test_rows_are_answered_as_by_one_model_with_a_replica_killed(served: Served, tmp_path: Path) -> None:
    from ray import serve

    serve.delete(APP)  # its CPUs are wanted
    killed: list[int] = []

    def progress(done: int, total: int, label: str) -> None:
        if done >= 40 and not killed:
            killed.append(kill_worker("MapWorker"))

    data = DEMO / "evaluation" / "questions.jsonl"
    options = BatchOptions(SamplingParams(max_tokens=16), slots=4, load={"threads": 1})
    summary = run_batch(served.bundle, data, tmp_path / "ray.jsonl", options, Cluster(replicas=2), progress)
    run_batch(served.bundle, data, tmp_path / "own.jsonl", options)
    assert len(killed) == 1
    assert summary.answered == summary.rows > 300
    texts = [
        [(row["id"], row["text"]) for row in map(json.loads, (tmp_path / name).read_text().splitlines())]
        for name in ("ray.jsonl", "own.jsonl")
    ]
    assert texts[0] == texts[1]


def kill_worker(name: str) -> int:
    """Kill -9 one of Ray's processes that works as `name`."""
    found = next(p for p in psutil.Process().children(recursive=True) if p.cmdline()[0].startswith(f"ray::{name}"))
    found.kill()
    return int(found.pid)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({}, "give bundle=DIRECTORY"),
        ({"bundle": "missing"}, "missing does not exist"),
        ({"bundle": "missing", "slot": "4"}, "unknown argument slot; known: bundle, replicas"),
        ({"bundle": "missing", "slots": "four"}, "slots=four: it must be a number"),
        ({"bundle": "missing", "replicas": "3", "max_replicas": "2"}, "must be from 1 to max_replicas"),
    ],
)
def test_arguments_of_serve_run_are_checked(args: dict[str, str], said: str) -> None:
    with pytest.raises(OneVisionError, match=said):
        build(args)
