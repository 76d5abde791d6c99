"""Write the calibration set: `python tools/train_demo/calibration_set.py --output demo/calibration`.

What quantisation is calibrated on where nothing else is given: scenes and questions like those of the evaluation set,
but composed from the training samples, so that calibration never sees what accuracy is measured on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evaluation_set import Size, write
from scenes import load_samples

SIZE = Size(singles=48, pairs=8, questions=1, seed=40)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    training, _ = load_samples()
    count = write(parser.parse_args().output, SIZE, training)
    print(f"{count} questions")


if __name__ == "__main__":
    main()
