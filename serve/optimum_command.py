"""optimum-cli export onevision: our export where optimum's users look for one.

Imported by optimum-cli alone, through optimum_register/register_onevision.py, so that nothing else needs optimum.
"""

import sys
from argparse import ArgumentParser, ArgumentTypeError
from typing import Any, NoReturn

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..errors import OneVisionError

# As export and precision.plan have them, which are too heavy to import for --help.
DTYPES = ("fp32", "fp16", "bf16")
PRECISIONS = ("int8", "int8-weight", "int4", "fp8", "nvfp4")


class OneVisionExport(BaseOptimumCLICommand):
    """The command; optimum makes it once for its parser and once, with the parsed arguments, to run."""

    COMMAND = CommandInfo(
        name="onevision", help="Export LLaVA-OneVision-1.5 to a bundle of ONNX graphs for onevision-edge."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add our arguments, named as those of optimum's other exports."""
        parser.add_argument("-m", "--model", required=True, help="Directory, hub id, or demo for the shipped model.")
        parser.add_argument("--task", choices=["auto", "image-text-to-text"], default="auto", help="The one there is.")
        parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="Of what is not quantised. Default: fp16")
        parser.add_argument(
            "--precision", choices=PRECISIONS, help="Quantise, on the shipped images, and measure the result."
        )
        parser.add_argument(
            "--max-length", type=_rows, help="Rows of the KV cache. Default: 4096, or the model's limit."
        )
        parser.add_argument("--overwrite", action="store_true", help="Replace the bundle if it exists.")
        parser.add_argument("output", help="Directory of the bundle to write.")

    def run(self) -> None:
        """Export, or end with exit code 1 and one line that says what is wrong."""
        try:
            _quantize(self.args) if self.args.precision else _export(self.args)
        except ImportError as error:
            _fail(f"export needs {error.name}: pip install 'onevision-edge[export]'")
        except OneVisionError as error:
            _fail(str(error))


def _rows(text: str) -> int:
    """A whole number from 1; argparse says what is wrong with another."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _fail(message: str) -> NoReturn:
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(1)


def _export(args: Any) -> None:
    from ..cli.export import run_export

    run_export(args.model, args.output, args.dtype, args.max_length, ["vision", "decoder"], args.overwrite)


def _quantize(args: Any) -> None:
    from ..calibration.recipe import Methods
    from ..cli.quantize import run_quantize
    from ..precision.plan import default_plan

    plan = default_plan(args.precision, args.dtype)
    run_quantize(args.model, args.output, plan, Methods(), max_length=args.max_length, overwrite=args.overwrite)
