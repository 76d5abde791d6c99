"""The onevision-edge command. Each verb is a file; heavy packages are imported when a verb runs."""

import errno
from typing import Any

import click

from .. import __version__
from ..errors import OneVisionError
from .batch import batch
from .bench import bench
from .build import build
from .bundles import inspect, verify
from .demo import demo
from .doctor import doctor
from .export import export
from .export_triton import export_triton
from .judge import judge
from .parity import parity
from .quantize import quantize
from .report import report
from .run import chat, run
from .serve import serve
from .targets import targets


class _Group(click.Group):
    """Turns the errors a user can mend into one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OneVisionError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output left; click ends quietly
                raise
            raise click.ClickException(f"{error.filename or 'input/output'}: {error.strerror or error}") from error
        except MemoryError as error:
            raise click.ClickException("out of memory: use a smaller model, length, batch or image") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="onevision-edge")
def main() -> None:
    """LLaVA-OneVision-1.5 on edge devices: export a checkpoint, run it, and know what you run.

    Results go to stdout, everything else to stderr. Exit code 0: done; 1: failed; 2: wrong usage.
    """


for command in (
    demo,
    export,
    quantize,
    build,
    run,
    chat,
    serve,
    batch,
    export_triton,
    inspect,
    verify,
    parity,
    bench,
    report,
    judge,
    targets,
    doctor,
):
    main.add_command(command)
