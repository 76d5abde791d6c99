"""What drafts from the text gain where it repeats itself, and what they cost where it does not.

    python benchmarks/speculation.py BUNDLE [--tokens 400] [--rounds 5] [--threads N]

The bundle's decoder runs, whatever it is worth, and says given texts, cut into words and signs: so acceptance is that
of real text and time that of real calls, and a random model of any size will do. Each text is said with drafts and
without, in turns, and the fastest of each counts, since other work makes a decoder slower and never faster:

- quote: the answer is a passage of the prompt;
- table: the manifest of the bundle, whose keys repeat;
- prose: the licence, its second half behind its first;
- new: random tokens, no two alike;
- misleading: the same, where every step finds a match and no draft is right.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import click
import numpy as np

import onevision_edge
from onevision_edge.cli.console import table
from onevision_edge.runtime.generation import Running, Timings
from onevision_edge.runtime.sampling import Sampled, SamplingParams
from onevision_edge.runtime.speculation import Lookup, Match
from onevision_edge.runtime.token_model import Media

LICENCE = Path(onevision_edge.__file__).with_name("LICENSE")
NO_MEDIA = {"image": Media(None, None), "video": Media(None, None)}
WORDS = re.compile(r"\w+|[^\w\s]")
PROMPT = 400  # tokens


class Script:
    """Stands in for a sampler: reads every row of logits as greedy choice does, and says what it is given."""

    def __init__(self, params: SamplingParams, tokens: np.ndarray) -> None:
        self.params, self._tokens = params, iter(tokens.tolist())

    def sample(self, logits: np.ndarray) -> Sampled:
        """The next token of the script."""
        logits.argmax()
        return Sampled(next(self._tokens))


@contextmanager
def misleading() -> Iterator[None]:
    """Every step has a match of the longest kind, and a draft of a token that is never said."""
    found, drafted = Lookup.match, Lookup.draft
    Lookup.match = lambda self: Match(8, 1)  # type: ignore[method-assign]
    Lookup.draft = lambda self, match, count: [0] * count  # type: ignore[method-assign]
    try:
        yield
    finally:
        Lookup.match, Lookup.draft = found, drafted  # type: ignore[method-assign]


def words(text: str) -> np.ndarray:
    """Ids of the words and signs of a text, from 1 on, in the order they come: int64."""
    ids: dict[str, int] = {}
    return np.array([ids.setdefault(word, len(ids) + 1) for word in WORDS.findall(text)])


def texts(bundle: Path, count: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Prompt and answer of each text, by name."""
    prose, manifest = words(LICENCE.read_text()), words((bundle / "manifest.json").read_text())
    new = np.arange(1, PROMPT + count + 1)
    passage = prose[:count]
    return {
        "quote": (np.concatenate([passage, new[:8]]), passage),
        "table": (manifest[:PROMPT], manifest[PROMPT : PROMPT + count]),
        "prose": (prose[:PROMPT], prose[PROMPT : PROMPT + count]),
        "new": (new[:PROMPT], new[PROMPT:]),
        "misleading": (new[:PROMPT], new[PROMPT:]),
    }


def say(
    model: onevision_edge.Model, ids: np.ndarray, script: np.ndarray, speculate: int | None
) -> tuple[Running, float]:
    """The sequence, which says the script, and the seconds that its tokens after the first took."""
    vocabulary = min(model.config.text.vocab_size, *model._media_ids.values())
    (prompt,) = model._embed([ids % vocabulary], NO_MEDIA)
    params = SamplingParams(max_tokens=len(script), speculate=speculate)
    sequence, timings = model._sequence(prompt, params, ()), Timings()
    sequence.sampler = Script(params, script % vocabulary)  # type: ignore[assignment]
    with model._loop(1, prompts=[prompt.keys]) as loop:
        for _ in loop.steps([sequence], timings):
            pass
    return sequence, timings.decode


def compare(run: Callable[[int | None], tuple[Running, float]], rounds: int) -> tuple[str, ...]:
    """Milliseconds per token without drafts and with, the change, and how many drafted tokens were right."""
    plain, drafting = [], []
    for _ in range(rounds):
        plain.append(run(0))
        drafting.append(run(None))
    before, after = (min(seconds / (len(s.token_ids) - 1) for s, seconds in runs) for runs in (plain, drafting))
    drafted, accepted = (sum(getattr(s, name) for s, _ in drafting) for name in ("drafted", "accepted"))
    change = f"{100 * (after / before - 1):+.1f} %"
    return f"{before * 1e3:.2f}", f"{after * 1e3:.2f}", change, f"{accepted} of {drafted}"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--tokens", default=400, show_default=True, help="Of each answer.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", type=int)
def main(bundle: Path, tokens: int, rounds: int, threads: int | None) -> None:
    """Print the comparison of each text. The bundle holds at least 1,024 tokens."""
    model, rows = onevision_edge.load(bundle, threads=threads), []
    for name, (prompt, answer) in texts(bundle, tokens).items():
        model._drafting.clear()
        say(model, prompt, answer[:8], 0)
        with misleading() if name == "misleading" else nullcontext():
            rows.append((name, *compare(partial(say, model, prompt, answer), rounds)))
    click.echo(table(rows, ("text", "ms/token", "with drafts", "change", "drafts right")))


if __name__ == "__main__":
    main()
