"""The largest deviation from each tensor of the authors' code, as tables.

    pytest tests/train/test_golden.py tests/train/test_golden_methods.py --junitxml golden.xml
    python bench/golden.py golden.xml bench/results/golden.json

Deviations are relative to the largest absolute value of the tensor, in float32 on a CPU.
"""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def main() -> None:
    """Collect the deviations that the golden tests recorded, print them by set and write them as JSON."""
    report, out = Path(sys.argv[1]), Path(sys.argv[2])
    sets: dict[str, dict[str, float]] = {}
    for node in ElementTree.parse(report).iter("property"):
        folder, _, tensor = node.attrib["name"].partition(": ")
        sets.setdefault(folder, {})[tensor] = float(node.attrib["value"])
    for folder, found in sorted(sets.items()):
        print(f"{folder}, {len(found)} tensors")
        for name, deviation in sorted(found.items()):
            print(f"  {name:46} {deviation:8.1e}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(sets, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
