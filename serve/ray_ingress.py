"""The deployment that Ray Serve's HTTP proxy calls: Front, as an ASGI application of its own process."""

from typing import Any

from ray import serve
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from .settings import Settings

_ONGOING = 10_000  # requests: what bounds them are the replicas' queues


class _Front:
    """Finds the Front of the process, which there is once the deployment was made."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await serve.get_replica_context().servable_object.front.serve(scope, receive, send)


@serve.ingress(Starlette(routes=[Mount("/", _Front())]))
class Ingress:
    """Takes every request of the cluster."""

    def __init__(self, models: Any, settings: Settings) -> None:
        from .ray_front import Front

        self.front = Front(models, settings)

    async def drain(self, seconds: float) -> bool:
        """As Front.drain; called through a handle."""
        return await self.front.drain(seconds)


def bound(models: Any, settings: Settings) -> Any:
    """The deployment with its arguments, for Ray Serve to run."""
    deployment = serve.deployment(
        Ingress,
        name="front",
        max_ongoing_requests=_ONGOING,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.request_seconds,
    )
    return deployment.bind(models, settings)
