"""onevision-edge serve"""

import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import say
from .engines_option import engines_of
from .extras import require

if TYPE_CHECKING:
    import socket

    from ..serve.settings import Settings


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option(
    "--api-key",
    envvar="ONEVISION_EDGE_API_KEY",
    show_envvar=True,
    metavar="KEY",
    help="What clients must send as Authorization: Bearer KEY. Prefer the variable: others can see options.",
)
@click.option("--model-name", metavar="NAME", help="What clients call the model.  [default: the bundle's directory]")
@click.option("--slots", type=click.IntRange(1), default=8, show_default=True, help="Answers generated at once.")
@click.option("--queue", type=click.IntRange(1), default=64, show_default=True, help="Requests that may wait.")
@click.option("--threads", type=click.IntRange(1), help="Threads per operator; one per physical core if not given.")
@click.option(
    "--vision-threads",
    type=click.IntRange(1),
    help="Threads of the tower, which works beside the decoder; as many as --threads if not given.",
)
@click.option(
    "--engines",
    metavar="TARGET",
    help="Run engines as built for TARGET; auto: those for this GPU; none: ONNX Runtime.  [default: cpu, if built]",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=80_000_000,
    show_default=True,
    help="Pixels of all images of a request, as they are sent; each is shrunk to what the model reads.",
)
@click.option("--max-images", type=click.IntRange(1), default=16, show_default=True, help="Images of a request.")
@click.option("--max-tokens", type=click.IntRange(1), default=4096, show_default=True, help="Longest answer.")
@click.option("--max-body-mb", type=click.IntRange(1), default=32, show_default=True, help="Largest request.")
@click.option(
    "--request-seconds", type=click.FloatRange(0, min_open=True), default=600.0, show_default=True, help="Longest wait."
)
@click.option(
    "--allow-image-host",
    "image_hosts",
    multiple=True,
    metavar="HOST[:PORT]",
    help="Fetch images from this host of the internet; may be repeated.  [default: data URLs alone]",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Answer to pages of this origin, such as https://example.org; may be repeated.  [default: none]",
)
@click.option(
    "--server-name",
    "server_names",
    multiple=True,
    metavar="NAME",
    help="Another name that requests may be sent to, as by a proxy, of a server on this machine without a key.",
)
@click.option("--ray", "on_ray", is_flag=True, help="Replicas on Ray Serve behind one address.")
@click.option("--ray-address", help="Of a cluster that runs.  [default: Ray on this machine]")
@click.option("--replicas", type=click.IntRange(1), default=1, show_default=True, help="With --ray: at least.")
@click.option("--max-replicas", type=click.IntRange(1), help="With --ray: at most, by load.  [default: as at least]")
@click.option("--replica-cpus", type=float, default=1, show_default=True, help="With --ray: that one takes.")
@click.option("--replica-gpus", type=float, default=0, show_default=True, help="With --ray: that one takes.")
def serve(
    bundle: Path,
    host: str,
    port: int,
    slots: int,
    queue: int,
    threads: int | None,
    vision_threads: int | None,
    engines: str | None,
    on_ray: bool,
    ray_address: str | None,
    replicas: int,
    max_replicas: int | None,
    replica_cpus: float,
    replica_gpus: float,
    **options: Any,
) -> None:
    """Answer over HTTP, as OpenAI's API does, with a page to try it at /.

    SIGTERM or Ctrl-C: requests in flight are answered, new ones refused; a second one ends at once.
    """
    require("serve", "serve", "prometheus_client", "pydantic", "starlette", "uvicorn")
    from ..runtime.scheduler import Scheduler
    from ..serve.app import create_app
    from ..serve.loading import load_to_serve
    from ..serve.server import Server, listening_socket

    settings = _settings(bundle, host, options)
    if on_ray:
        from ..serve.ray_app import RayOptions, run_ray

        spread = RayOptions(
            replicas, max_replicas, slots, queue, replica_cpus, replica_gpus, threads=threads, engines=engines
        )
        told = f"{settings.model_name} at %s, on Ray (Ctrl-C ends it)"
        run_ray(bundle, settings, spread, host=host, port=port, address=ray_address, ready=lambda url: say(told % url))
        return
    with listening_socket(host, port) as listening:
        model = load_to_serve(
            bundle.resolve(), threads=threads, vision_threads=vision_threads, engines=engines_of(engines)
        )
        scheduler = Scheduler(model, slots=slots, queue=queue)  # whose slots keep what they hold of a conversation
        server = Server(create_app(scheduler, settings), scheduler, settings.request_seconds)
        scheduler.start()
        try:
            say(f"{settings.model_name} at {_address(listening)} (Ctrl-C ends it)")
            server.run(sockets=[listening])
        finally:
            scheduler.stop()


def _settings(bundle: Path, host: str, options: dict[str, Any]) -> "Settings":
    from ..serve.settings import Settings

    options = dict(options)
    model_name = options.pop("model_name") or bundle.resolve().name
    local = _is_loopback(host)
    if not local and options["api_key"] is None:
        say(f"Warning: {host} can be reached from other machines, and without --api-key anybody there may ask.")
    names = ("localhost", "127.0.0.1", "::1", host, *options.pop("server_names"))
    return Settings(
        model_name=model_name,
        max_body_bytes=options.pop("max_body_mb") * 1_000_000,
        server_names=names if local and options["api_key"] is None else (),
        **options,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(listening: "socket.socket") -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
