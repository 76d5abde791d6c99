"""The Python model of a Triton repository: questions in, answers out, many at a time.

Inputs: `messages` (JSON, the chat messages; images as data URLs), or `prompt` and `images` (encoded files, one a
string); `options` (JSON: fields of SamplingParams, min_pixels, max_pixels); `stream`. Outputs: `text`,
`finish_reason`, `usage` (JSON). Without `stream` there is one response; with it one for each piece of text, and a
last one without text that has the reason and the usage.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..engines.cpu.record import has_engine
from ..engines.record import ENGINES, read_set
from ..errors import OneVisionError
from ..runtime.backend import SessionOptions
from ..runtime.cache import Backend
from ..runtime.chat import media_of
from ..runtime.cpu_engine import CpuEngine, CpuOrPlain
from ..runtime.model import Generation, Model
from ..runtime.prompts import Messages
from ..runtime.scheduler import ChatRequest, Event, Failed, Piece, Scheduler, Ticket
from ..runtime.token_model import sampling_params
from .triton_graph import TritonBackend

_DRAIN_SECONDS = 30.0


class TritonAnswers:
    """What Triton's Python backend calls. A subclass says in which folder the bundle is."""

    folder: Path

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle. args: `model_config`, JSON."""
        self.server = _server()
        raw = json.loads(args["model_config"])["parameters"]
        parameters = {name: value["string_value"] for name, value in raw.items()}
        bundle = Bundle.open(self.folder / "bundle")
        model = Model(bundle, _backend(bundle, parameters, self.server))
        self.scheduler = Scheduler(model, slots=int(parameters["slots"]))
        self.scheduler.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests; their answers are sent as they come, from other threads."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                answer = _Answer(self.server, sender, self.scheduler, _value(self.server, request, "stream", False))
                answer.ticket = self.scheduler.submit(_chat_request(self.server, request), answer)
            except OneVisionError as error:
                _send_error(self.server, sender, str(error))

    def finalize(self) -> None:
        """Answer what is in flight, and end."""
        self.scheduler.drain(_DRAIN_SECONDS)
        self.scheduler.stop()


class _Answer:
    """Sends the events of one request to its client."""

    def __init__(self, server: Any, sender: Any, scheduler: Scheduler, stream: bool) -> None:
        self.server, self.sender, self.scheduler, self.stream = server, sender, scheduler, stream
        self.ticket: Ticket | None = None

    def __call__(self, event: Event) -> None:
        if self.ticket is not None and self.sender.is_cancelled():
            self.scheduler.cancel(self.ticket)
            _send_error(self.server, self.sender, "cancelled", self.server.TritonError.CANCELLED)
        elif isinstance(event, Failed):
            _send_error(self.server, self.sender, _told(event.error))
        elif not isinstance(event, Piece):
            answer = event.generation
            text = "" if self.stream else answer.text
            self._send(text, answer.finish_reason, json.dumps(usage(answer)), final=True)
        elif self.stream and event.text:
            self._send(event.text, "", "", final=False)

    def _send(self, *texts: str, final: bool) -> None:
        names = ("text", "finish_reason", "usage")
        tensors = [_strings(self.server, name, text) for name, text in zip(names, texts, strict=True)]
        flags = self.server.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        self.sender.send(self.server.InferenceResponse(output_tensors=tensors), flags=flags)


def usage(answer: Generation) -> dict[str, int]:
    """What an answer was spent on, and spared, in tokens."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.token_ids),
        "total_tokens": answer.prompt_tokens + len(answer.token_ids),
        "image_tokens": answer.image_tokens,
        "cached_tokens": answer.cached_tokens,
        "cached_image_tokens": answer.cached_image_tokens,
    }


def _server() -> Any:
    """The module that Triton gives its Python models."""
    import triton_python_backend_utils

    return triton_python_backend_utils


def _backend(bundle: Bundle, parameters: Mapping[str, str], server: Any) -> Backend:
    models = {part: parameters[part] for part in ("vision", "decoder") if parameters[part]}
    threads = int(parameters["threads"]) if parameters["threads"] else None
    target = parameters["engines"]
    if target:
        from ..runtime.engine_backend import Engines

        engines = read_set(bundle.directory / ENGINES / target)
        return TritonBackend(server, models, Engines(target), engines)
    plain = SessionOptions(threads=threads)
    return TritonBackend(server, models, CpuOrPlain(CpuEngine(threads), plain) if has_engine(bundle) else plain)


def _chat_request(server: Any, request: Any) -> ChatRequest:
    """What a request asks. Raises OneVisionError naming the input that is wrong."""
    options = _json(server, request, "options", {})
    if not isinstance(options, dict):
        raise OneVisionError('options is not a JSON object such as {"max_tokens": 64}')
    pixels = {name: options.pop(name, None) for name in ("min_pixels", "max_pixels")}
    for name, value in pixels.items():
        if value is not None and not (type(value) is int and value > 0):
            raise OneVisionError(f"options: {name} is {value!r}; it must be a whole number from 1")
    return ChatRequest(_messages(server, request), sampling_params(options), **pixels)


def _messages(server: Any, request: Any) -> Messages:
    messages, prompt = _json(server, request, "messages", None), _value(server, request, "prompt", None)
    if (messages is None) == (prompt is None):
        raise OneVisionError("give either messages or prompt")
    if messages is None:
        images = [{"type": "image", "image": bytes(data)} for data in _values(server, request, "images")]
        return [{"role": "user", "content": [*images, {"type": "text", "text": _text(prompt, "prompt")}]}]
    _check_media(messages)
    return messages


def _check_media(messages: Messages) -> None:
    """Refuse what would be read from the server's disk."""
    images, videos = media_of(messages)
    frames = [f for video in videos for f in (video.source if isinstance(video.source, list) else [video.source])]
    for source in (*images, *frames):
        if not (isinstance(source, str) and source[:5].lower() == "data:"):
            raise OneVisionError("an image of the messages is not a data URL; files of the server are not read")


def _json(server: Any, request: Any, name: str, default: Any) -> Any:
    value = _value(server, request, name, None)
    if value is None:
        return default
    try:
        return json.loads(_text(value, name))
    except (ValueError, RecursionError) as error:
        raise OneVisionError(f"{name} is not JSON ({error})") from error


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise OneVisionError(f"{name} is not UTF-8") from error


def _value(server: Any, request: Any, name: str, default: Any) -> Any:
    """The one value of an input; the default where it is left out."""
    values = _values(server, request, name)
    return values[0] if values else default


def _values(server: Any, request: Any, name: str) -> list[Any]:
    tensor = server.get_input_tensor_by_name(request, name)
    return [] if tensor is None else tensor.as_numpy().reshape(-1).tolist()


def _strings(server: Any, name: str, text: str) -> Any:
    return server.Tensor(name, np.array([text.encode()], np.object_))


def _send_error(server: Any, sender: Any, message: str, code: Any = None) -> None:
    error = server.TritonError(message) if code is None else server.TritonError(message, code)
    response = server.InferenceResponse(error=error)
    sender.send(response, flags=server.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _told(error: Exception) -> str:
    """What the client may know: the server's own faults stay in its log."""
    return str(error) if isinstance(error, OneVisionError) else "the server failed to answer; its log says why"
