"""Attributes of models on the photographs whose labels they have seen, and on others: what is known by heart.

    python bench/attributes_by_heart.py --data ../shared/data/ccp [--out FILE] NAME=MODEL...

Models are checkpoints or bundles with a head for attributes.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from dpal_edge.evaluate.predictor import Choice, Predictor, open_predictor
from dpal_edge.files import write_text
from dpal_edge.tasks.attributes import attribute_metrics, read_attribute_table
from dpal_edge.tasks.image import read_crop

RESULTS = Path(__file__).parent / "results" / "attributes_by_heart.json"
BATCH = 32


def mean_accuracy(predictor: Predictor, data: Path, split: str) -> float:
    """Return mA, 0..1, on ``split`` of a table of attributes."""
    samples = read_attribute_table(data, split).samples
    logits = [
        predictor(np.stack([read_crop(sample, predictor.size) for sample in samples[i : i + BATCH]]), "attributes")
        for i in range(0, len(samples), BATCH)
    ]
    truth = np.stack([sample.target for sample in samples])
    return attribute_metrics(np.concatenate(logits) > 0, truth)["mA"]


def main() -> None:
    """Score the models and file the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    options = parser.parse_args()
    results = {}
    for text in options.models:
        name, _, model = text.partition("=")
        predictor = open_predictor(model, Choice())
        seen, unseen = (mean_accuracy(predictor, options.data, split) for split in ("train", "val"))
        results[name] = {"mA_train": seen, "mA_val": unseen, "sha256": predictor.description["sha256"]}
        print(f"{name}: {seen:.3f} on photographs of the training, {unseen:.3f} on others")
    write_text(options.out, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
