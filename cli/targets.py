"""targets: what engines can be built for, and what each can run."""

from typing import TYPE_CHECKING, Any

import click

from .console import print_json, size, table

if TYPE_CHECKING:
    from ..engines.targets import Target


@click.command()
@click.argument("names", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs: rates and sources, too.")
def targets(names: tuple[str, ...], as_json: bool) -> None:
    """List devices and compute capabilities, with the precisions that run there; or the targets of NAMES.

    A name is a device's, some of its words (a100, jetson-orin), a compute capability (sm87) or cpu.
    """
    from ..engines.targets import target
    from ..engines.targets import targets as known

    found = [target(name) for name in names] if names else known()
    if as_json:
        print_json([_record(one) for one in found])
        return
    header = ("target", "capability", "memory", "bandwidth", "INT8 rate", "precisions", "decoder's default")
    click.echo(table([_row(one) for one in found], header))
    if len(found) == 1:
        click.echo(f"\n{found[0].decoder}: {found[0].reason}\nsource: {found[0].source}")


def _row(target: "Target") -> tuple[str, ...]:
    return (
        target.name,
        target.capability or "",
        f"{target.memory / 2**30:.0f} GiB" if target.memory else "",
        f"{size(target.bandwidth)}/s" if target.bandwidth else "",
        f"{target.rates['int8'] / 1e12:.0f} TOPS" if "int8" in target.rates else "",
        ", ".join(target.precisions),
        target.decoder,
    )


def _record(target: "Target") -> dict[str, Any]:
    return {
        "name": target.name,
        "compute_capability": target.capability,
        "memory": target.memory,
        "bandwidth": target.bandwidth,
        "rates": dict(target.rates),
        "precisions": list(target.precisions),
        "dtypes": list(target.dtypes),
        "dtype": target.dtype,
        "decoder": target.decoder,
        "reason": target.reason,
        "source": target.source,
    }
