"""What /metrics tells Prometheus: the scheduler's counts, times of requests, and answers by status."""

from collections.abc import Callable, Iterator
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..runtime.scheduler import Event, Finished, Piece, Scheduler, SchedulerStats
from .errors import GONE

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_PREFIX = "onevision_edge"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)
_ROUTES = ("/", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/chat/completions")

# SchedulerStats field: metric, help
_GAUGES = {
    "running": ("requests_running", "Requests that generate now"),
    "waiting": ("requests_waiting", "Requests in the queue"),
    "slots": ("slots", "Requests that can generate at once"),
}
_COUNTERS = {
    "steps": ("decoder_steps", "Calls of the decoder that advanced answers"),
    "decoded_tokens": ("decoded_tokens", "Tokens out of these calls"),
    "cancelled": ("requests_cancelled", "Requests given up by their clients"),
}
_TOKENS = {  # field: kind
    "prompt_tokens": "prompt",
    "image_tokens": "image",
    "generated_tokens": "generated",
}
_CACHED = {"cached_tokens": "prompt", "cached_image_tokens": "image"}


class Metrics:
    """The measurements of one server, in a registry of their own."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_SchedulerCounts(scheduler))
        self._first = self._histogram("time_to_first_token_seconds", "From submission to the first text", _SECONDS)
        self._between = self._histogram("inter_token_seconds", "From one piece of text to the next", _STEP_SECONDS)
        self._whole = self._histogram("request_seconds", "From submission to the last token", _SECONDS)
        self._queued = self._histogram("queue_seconds", "From submission to the start of work", _SECONDS)
        self._answers = Counter(
            f"{_PREFIX}_http_requests", "Answers by route and status", ["route", "status"], registry=self.registry
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def answered(self, path: str, status: int) -> None:
        """Count one answer."""
        self._answers.labels(path if path in _ROUTES else "other", str(status)).inc()

    def listener(self) -> Callable[[Event], None]:
        """What is to see every event of a request that is submitted now."""
        submitted = perf_counter()
        last: float | None = None

        def hear(event: Event) -> None:
            nonlocal last
            now = perf_counter()
            if isinstance(event, Piece):
                self._first.observe(now - submitted) if last is None else self._between.observe(now - last)
                last = now
            elif isinstance(event, Finished):
                self._whole.observe(now - submitted)
                self._queued.observe(event.queue_seconds)

        return hear

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", text, buckets=buckets, registry=self.registry)


class _SchedulerCounts(Collector):
    """The scheduler's own numbers, read when they are asked for."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Every family of metrics."""
        stats = self._scheduler.stats
        for field, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=getattr(stats, field))
        for field, (name, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"{_PREFIX}_{name}", text, value=getattr(stats, field))
        yield _by_kind(stats, "tokens", "Tokens of prompts, images in them, and answers", _TOKENS)
        yield _by_kind(stats, "cached_tokens", "Tokens that caches saved the work for", _CACHED)
        yield _by_kind(stats, "requests_ended", "Requests by their end", {"finished": "finished", "failed": "failed"})


def _by_kind(stats: SchedulerStats, name: str, text: str, kinds: dict[str, str]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"{_PREFIX}_{name}", text, labels=["kind"])
    for field, kind in kinds.items():
        family.add_metric([kind], getattr(stats, field))
    return family


class CountAnswers:
    """ASGI middleware that counts every answer by its status; GONE where the client left before any."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = GONE

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception:
            status = 500  # which an outer layer will answer with
            raise
        finally:
            self.metrics.answered(scope["path"], status)
