"""Bundles as models of lmms-eval; lmms-eval imports this module, see lmms_eval.py for the command.

Arguments of --model_args: pretrained (the bundle), and threads, engines, provider, min_pixels, max_pixels as `load` has
them. Generation is greedy unless the task sets a temperature; beams are not searched.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from ...calibration.quality import log_softmax
from ...errors import OneVisionError
from ...runtime.model import Model, load
from ...runtime.prompts import token_prompt
from ...runtime.video import IMAGE_SUFFIXES

MOST_TOKENS = 128  # of an answer, where the task does not say
_OPTIONS = ("threads", "engines", "provider", "min_pixels", "max_pixels")


class _Bundle(lmms):
    """A loaded bundle that answers lmms-eval's requests."""

    def __init__(self, pretrained: str, batch_size: int | str = 1, **arguments: Any) -> None:
        super().__init__()
        own = {name: value for name, value in arguments.items() if name in _OPTIONS}
        unknown = set(arguments) - set(own) - {"device", "max_batch_size"}  # which lmms-eval gives to every model
        if unknown:
            raise OneVisionError(f"--model_args has {', '.join(sorted(unknown))}; known are {', '.join(_OPTIONS)}")
        self.batch_size = int(batch_size)
        self.bundle: Model = load(pretrained, **own)

    def messages(self, request: Instance) -> list[dict[str, Any]]:
        """The chat messages of a request."""
        raise NotImplementedError

    def options(self, request: Instance) -> Mapping[str, Any]:
        """The generation options of a request, by lmms-eval's names."""
        raise NotImplementedError

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests, each with the tokens it took."""
        found = []
        with tqdm(total=len(requests), desc="onevision-edge") as bar:
            for batch, options in self._batches(requests):
                answers = self.bundle.generate([self.messages(request) for request in batch], **options)
                found += [GenerationResult(a.text, TokenCounts(a.prompt_tokens, len(a.token_ids))) for a in answers]
                bar.update(len(batch))
        return found

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(mean negative log-likelihood of the continuation's tokens, whether greedy decoding gives it) of each.

        A loss, as lmms-eval 0.7 takes the least, and as its own models give it. White space before a continuation is
        left out: here it follows the line that opens the assistant's turn.
        """
        pairs = [self._loss(request) for request in tqdm(requests, desc="onevision-edge")]
        return [GenerationResult(pair) for pair in pairs]  # a bare pair would be turned into text

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Always raises: rounds that depend on earlier answers are not supported."""
        raise OneVisionError("tasks of several rounds are not supported; choose tasks of output type generate_until")

    def _batches(self, requests: list[Instance]) -> Iterator[tuple[list[Instance], dict[str, Any]]]:
        """Neighbours with the same options, at most batch_size of them."""
        for options, group in groupby(requests, lambda request: generation_options(self.options(request))):
            members = list(group)
            for start in range(0, len(members), self.batch_size):
                yield members[start : start + self.batch_size], options

    def _loss(self, request: Instance) -> tuple[float, bool]:
        tokenizer = self.bundle.tokenizer
        if tokenizer is None:
            raise OneVisionError(f"{self.bundle.bundle.directory} has no tokenizer.json, which text needs")
        prompt = token_prompt(self.messages(request), self.bundle.config, tokenizer, self.bundle.processor)
        answer = np.array(tokenizer.encode(self.continuation(request).lstrip()), np.int64)
        if not len(answer):
            raise OneVisionError("a continuation is empty, so that it has no likelihood; check the task's choices")
        ids = np.concatenate([prompt.ids, answer])
        positions = np.arange(len(prompt.ids) - 1, len(ids) - 1)
        images, videos = prompt.images, prompt.videos
        logits = self.bundle.logits_at(
            positions, ids, images.pixel_values, images.grid_thw, videos.pixel_values, videos.grid_thw
        )
        likely = log_softmax(logits)
        return -float(likely[np.arange(len(answer)), answer].mean()), bool((likely.argmax(axis=1) == answer).all())

    def continuation(self, request: Instance) -> str:
        """The text whose likelihood a request asks for."""
        target = request.args[1]
        return str(target(self._doc(request)) if callable(target) else target)

    def _doc(self, request: Instance) -> Any:
        doc_id, task, split = request.args[-3:]
        return self.task_dict[task][split][doc_id]


class SimpleBundle(_Bundle):
    """Tasks of a context and what it shows: (context, options or continuation, doc_to_visual, id, task, split)."""

    is_simple = True

    def messages(self, request: Instance) -> list[dict[str, Any]]:
        """One turn of the user: what is shown, then the context."""
        visuals = request.args[2](self._doc(request)) or []
        content = [*map(_visual, visuals), {"type": "text", "text": request.args[0]}]
        return [{"role": "user", "content": content}]

    def options(self, request: Instance) -> Mapping[str, Any]:
        """The generation options of a request, by lmms-eval's names."""
        return request.args[1]


class ChatBundle(_Bundle):
    """Tasks that give chat messages: (context, doc_to_messages, options, id, task, split)."""

    is_simple = False

    def messages(self, request: Instance) -> list[dict[str, Any]]:
        """The messages, their media under the names of this package."""
        return [
            {"role": message["role"], "content": [_item(item) for item in message["content"]]}
            for message in request.args[1](self._doc(request))
        ]

    def options(self, request: Instance) -> Mapping[str, Any]:
        """The generation options of a request, by lmms-eval's names."""
        return request.args[2]


def generation_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """lmms-eval's generation options (max_new_tokens, until, temperature, top_p) as those of this package."""
    until: str | Sequence[str] = given.get("until") or ()
    options: dict[str, Any] = {
        "max_tokens": int(given.get("max_new_tokens") or MOST_TOKENS),
        "stop": tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        "temperature": float(given.get("temperature") or 0),
    }
    if options["temperature"] and given.get("top_p") is not None:
        options["top_p"] = float(given["top_p"])
    return options


def _visual(source: Any) -> dict[str, Any]:
    """An image, or a video where it is a path that is no image's."""
    is_image = isinstance(source, Image.Image) or str(source).lower().endswith(tuple(IMAGE_SUFFIXES))
    kind = "image" if is_image else "video"
    return {"type": kind, kind: source}


def _item(item: Mapping[str, Any]) -> dict[str, Any]:
    kind = item["type"]
    if kind == "text":
        return {"type": "text", "text": item["text"]}
    if kind not in ("image", "video"):
        raise OneVisionError(f"a message has {kind}; this family sees images and videos, and reads text")
    return {"type": kind, kind: item["url"]}
