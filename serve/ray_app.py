"""Replicas of the HTTP application on Ray Serve.

    serve run onevision_edge.serve.ray_app:build bundle=BUNDLE max_replicas=4     on a cluster that runs
    onevision-edge serve BUNDLE --ray                                            on this machine, or with an address

Requests enter at one light process (ray_front.py), which sends each to a replica that has seen its beginning or its
images (ray_router.py, affinity.py), and to another one where that replica dies. The number of replicas follows the
requests under way.
"""

import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..errors import OneVisionError
from .batch_ray import connected
from .settings import Settings

APP = "onevision"


@dataclass(frozen=True, slots=True)
class RayOptions:
    """How many replicas there are, and what each takes. load: options of onevision_edge.load."""

    replicas: int = 1  # at least
    max_replicas: int | None = None  # at most; None: as many as at least
    slots: int = 8
    queue: int = 64
    cpus: float = 1
    gpus: float = 0
    imbalance: int = 4  # requests by which a replica may be ahead before another is preferred to it
    threads: int | None = None
    engines: str | None = None

    def __post_init__(self) -> None:
        most = self.replicas if self.max_replicas is None else self.max_replicas
        if not 1 <= self.replicas <= most:
            raise OneVisionError(f"replicas ({self.replicas}) must be from 1 to max_replicas ({most})")

    @property
    def load(self) -> dict[str, Any]:
        """What `onevision_edge.load` is told."""
        from ..cli.engines_option import engines_of

        return {"threads": self.threads, "engines": engines_of(self.engines)}


def build(args: Mapping[str, str]) -> Any:
    """The application for `serve run`. args: bundle=, and fields of RayOptions and Settings. Raises OneVisionError."""
    given = dict(args)
    bundle = given.pop("bundle", None)
    if bundle is None:
        raise OneVisionError("give bundle=DIRECTORY, which has to be there on every machine of the cluster")
    options, settings = (_picked(kind, given) for kind in (RayOptions, Settings))
    if given:
        known = ", ".join(field.name for kind in (RayOptions, Settings) for field in fields(kind))
        raise OneVisionError(f"unknown argument {', '.join(sorted(given))}; known: bundle, {known}")
    return application(Path(bundle), Settings(**settings), RayOptions(**options))


def application(bundle: Path, settings: Settings, options: RayOptions) -> Any:
    """A Ray Serve application of a bundle. Raises OneVisionError where it is none, before anything is started."""
    Bundle.open(bundle)
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    from .ray_ingress import bound
    from .ray_replica import ModelReplica
    from .ray_router import AffineRouter

    models = serve.deployment(
        ModelReplica,
        name="model",
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.replicas,
            max_replicas=options.max_replicas or options.replicas,
            target_ongoing_requests=options.slots,
        ),
        max_ongoing_requests=options.slots + options.queue,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=AffineRouter, request_router_kwargs={"imbalance": options.imbalance}
        ),
        health_check_period_s=2,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=settings.request_seconds,
    ).bind(str(bundle.resolve()), settings, options.slots, options.queue, options.load)
    return bound(models, settings)


def run_ray(
    bundle: Path,
    settings: Settings,
    options: RayOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    address: str | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGINT or SIGTERM, then answer what is under way and end.

    address: of a Ray cluster; None starts one on this machine. ready: told the URL once replicas are up.
    Raises OneVisionError where Ray is not installed, or the application does not start.
    """
    ray = connected(address)
    from ray import serve

    try:
        serve.start(http_options={"host": host, "port": port})
        front = serve.run(application(bundle, settings, options), name=APP)
        _wait(lambda: ready(f"http://{host}:{port}"))
        front.drain.remote(settings.request_seconds).result()
    except RuntimeError as error:
        raise OneVisionError(f"Ray Serve did not start: {str(error).strip().splitlines()[-1]}") from error
    finally:
        serve.shutdown()
        ray.shutdown()


def _wait(ready: Callable[[], None]) -> None:
    """Until a signal asks to end. Ray takes over the signals' handlers when it starts, so that ours come after it."""
    ended = threading.Event()
    previous = {sign: signal.signal(sign, lambda *_: ended.set()) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        ready()
        ended.wait()
    finally:
        for sign, handler in previous.items():
            signal.signal(sign, handler)


def _picked(kind: type, given: dict[str, str]) -> dict[str, Any]:
    """Take the fields of a dataclass out of arguments, which are text. Raises OneVisionError for what is no number."""
    found = {}
    for field in fields(kind):
        if field.name in given:
            found[field.name] = _value(field.name, given.pop(field.name), str(field.type))
    return found


def _value(name: str, text: str, kind: str) -> Any:
    try:
        for number in (int, float):
            if number.__name__ in kind:
                return number(text)
    except ValueError:
        raise OneVisionError(f"{name}={text}: it must be a number") from None
    return tuple(text.split(",")) if "tuple" in kind else text
