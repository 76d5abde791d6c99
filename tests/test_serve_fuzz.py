"""The shipped model's server against requests made from its own description.

No answer is an error inside, and all are as described. A minute for FUZZ_EXAMPLES requests of each kind to each
address, 200 unless said; needs schemathesis.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving import EXAMPLES, live

import onevision_edge
from onevision_edge.runtime.scheduler import Scheduler
from onevision_edge.serve.settings import Settings

pytest.importorskip("schemathesis")

# A described question can still be refused, for what a schema does not say: an address that is no image.
OPTIONS = ["--checks", "all", "--exclude-checks", "positive_data_acceptance", "--phases", "examples,coverage,fuzzing"]


@pytest.mark.slow
def test_every_answer_is_as_described(tmp_path: Path) -> None:
    onevision_edge.export("demo", tmp_path / "bundle", dtype="fp32")
    scheduler = Scheduler(onevision_edge.load(tmp_path / "bundle", threads=1))
    scheduler.start()
    with live(scheduler, Settings(api_key="key", max_tokens=16)) as (address, _):
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
        options = [*OPTIONS, "--max-examples", str(EXAMPLES), "--header", "Authorization: Bearer key", "--no-color"]
        done = subprocess.run(
            [*command, f"{address}/openapi.json", *options], capture_output=True, text=True, cwd=tmp_path, timeout=900
        )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated is not None
    assert int(generated[1]) > EXAMPLES
    assert scheduler.stats.finished > 0
    scheduler.stop()
