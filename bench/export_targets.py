"""Every target of the model that ships, in one run, gated on the validation parts of its tasks.

    python bench/export_targets.py --shared ../shared [--work DIR] [--out bench/results/export_targets.json]

Calibrates on training photographs of two sets. Half an hour or more on two cores without AVX-512: each candidate is
scored on 2,600 images. Files the bundle's own report, without the ranges of each tensor.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from dpal_edge.export.targets import TARGETS
from dpal_edge.runtime.device import cpu_features

ROOT = Path(__file__).parents[1]
STUDENT = ROOT / "dpal_edge" / "assets" / "dpal_vit_tiny.safetensors"
GATE = {"pose": "lspet", "parsing": "ccp", "attributes": "ccp", "reid": "cuhk01"}
CALIBRATION = ("ccp/train_images", "lspet/train")


def main() -> None:
    """Export, and file what the report says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "export_targets.json")
    options = parser.parse_args()
    bundle = options.work / "export_targets"
    given = [text for name in TARGETS for text in ("--target", name)]
    given += [text for name in CALIBRATION for text in ("--calibration", str(options.shared / "data" / name))]
    given += [text for task, name in GATE.items() for text in ("--gate", f"{task}={options.shared / 'data' / name}")]
    command = [sys.executable, "-m", "dpal_edge", "export", str(STUDENT), *given, "--out", str(bundle)]
    done = subprocess.run(command, check=False)
    if done.returncode not in (0, 2):  # 2: some targets are refused, which is a result
        sys.exit(done.returncode)
    facts = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    del facts["ranges"]
    facts |= {"device": cpu_features().model, "flags": list(cpu_features().flags)}
    options.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
