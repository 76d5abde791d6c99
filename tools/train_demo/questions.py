"""Questions about scenes and their one right answer; a question is only asked where it has one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from scenes import COLOURS, Digit, Scene


@dataclass(frozen=True)
class Question:
    """What is asked, the exact answer, and the kind under which accuracy is counted."""

    prompt: str
    answer: str
    kind: str


WORDINGS: dict[str, tuple[str, ...]] = {
    "number": ("What number is written?", "Read the number.", "Which number is this?"),
    "count": ("How many digits are there?", "How many digits do you see?"),
    "colour": ("What colour is the {0}?", "What color is the {0}?"),
    "digit": ("Which digit is {0}?", "What digit is {0}?"),
    "left": ("What is left of the {0}?", "What is to the left of the {0}?"),
    "right": ("What is right of the {0}?", "What is to the right of the {0}?"),
    "list": ("List the digits from left to right.", "List all digits from left to right."),
    "describe": ("What is in the image?", "Describe the image."),
    "largest": ("Which digit has the greatest value?", "What is the greatest digit?"),
    "edge": ("Which digit is {0}?", "What is the {0} digit?"),
    "colour_count": ("How many digits are {0}?", "How many {0} digits are there?"),
    "compare": ("Which image has the larger number?", "In which image is the number larger?"),
    "read_one": ("What number is in the {0} image?", "Read the number in the {0} image."),
    "colour_one": (
        "What colour is the number in the {0} image?",
        "What color is the number in the {0} image?",
    ),
}


def phrase(digit: Digit) -> str:
    """Such as "a blue 7" or "an orange 2"."""
    article = "an" if digit.colour[0] in "aeiou" else "a"
    return f"{article} {digit.colour} {digit.value}"


def number(scene: Scene) -> str:
    """The digits read from left to right."""
    return "".join(str(digit.value) for digit in scene.digits)


def ask(scenes: tuple[Scene, ...], rng: np.random.Generator) -> list[Question]:
    """Every kind of question that has one right answer for this scene, or pair of scenes, once or twice each."""
    facts = _pair_facts(*scenes) if len(scenes) == 2 else _single_facts(scenes[0], rng)
    return [Question(str(rng.choice(WORDINGS[kind])).format(slot), answer, kind) for kind, slot, answer in facts]


def _single_facts(scene: Scene, rng: np.random.Generator) -> list[tuple[str, object, str]]:
    digits = scene.digits
    facts: list[tuple[str, object, str]] = [
        ("count", "", str(len(digits))),
        ("list", "", ", ".join(f"{d.colour} {d.value}" for d in digits)),
        ("largest", "", str(max(d.value for d in digits))),
    ]
    if scene.layout == "row" or len(digits) == 1:
        facts.append(("number", "", number(scene)))
    if len(digits) <= 3:
        facts.append(("describe", "", _sentence([phrase(d) for d in digits])))
    if len(digits) > 1:
        side = int(rng.integers(2))
        facts.append(("edge", ("leftmost", "rightmost")[side], str(digits[-side].value)))
    return facts + _unique_facts(digits, rng)


def _unique_facts(digits: tuple[Digit, ...], rng: np.random.Generator) -> list[tuple[str, object, str]]:
    """Questions that name a digit or a colour found only once."""
    values, colours = Counter(d.value for d in digits), Counter(d.colour for d in digits)
    facts: list[tuple[str, object, str]] = []
    for i in rng.permutation(len(digits))[:2]:
        digit = digits[i]
        if colours[digit.colour] == 1:
            facts.append(("digit", digit.colour, str(digit.value)))
        if values[digit.value] == 1:
            facts.append(("colour", digit.value, digit.colour))
            if len(digits) > 1:
                facts.append(("left", digit.value, phrase(digits[i - 1]) if i else "nothing"))
                facts.append(("right", digit.value, phrase(digits[i + 1]) if i + 1 < len(digits) else "nothing"))
    asked = str(rng.choice([d.colour for d in digits] if rng.random() < 0.7 else list(COLOURS)))
    facts.append(("colour_count", asked, str(colours[asked])))
    return facts


def _pair_facts(first: Scene, second: Scene) -> list[tuple[str, object, str]]:
    scenes = {"first": first, "second": second}
    facts: list[tuple[str, object, str]] = [("read_one", name, number(scene)) for name, scene in scenes.items()]
    for name, scene in scenes.items():
        if len({d.colour for d in scene.digits}) == 1:
            facts.append(("colour_one", name, scene.digits[0].colour))
    a, b = int(number(first)), int(number(second))
    if a != b:
        facts.append(("compare", "", "the first" if a > b else "the second"))
    return facts


def _sentence(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
