"""What an update costs when the C library gives freed memory back to the kernel, and when it keeps it.

    python bench/allocator.py [--rounds 3] [--out bench/results/allocator.json]

Forward and backward of a ViT-S/16 in bf16 on 64 crops of 224x112, as in fine-tuning, each variant in a process of its
own, taking turns. Expected: each update allocates about 2 GB in blocks above 32 MB; clearing their pages at 4 GB/s is
half a second in vain, a fifth of it. Found: 8 % (bench/results/allocator.json).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from dpal_edge.models.students import build_student, init_student_weights, student_config
from dpal_edge.runtime.device import cpu_features
from dpal_edge.train.loop import autocast
from dpal_edge.train.memory import keep_freed_memory

VARIANTS = ("given back", "kept")
_BATCH, _UPDATES = 64, 4


def main() -> None:
    """Time both variants in turn, and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only)))
        return
    rates: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.rounds):
        for variant in VARIANTS:
            done = subprocess.run([sys.executable, __file__, "--only", variant], check=True, stdout=subprocess.PIPE)
            rates[variant].append(json.loads(done.stdout))
    medians = {variant: round(statistics.median(values), 2) for variant, values in rates.items()}
    ratio = round(medians["kept"] / medians["given back"], 3)
    print(f"images/s: {medians}; ratio {ratio}")
    if options.out:
        facts = {"what": "ViT-S/16 forward and backward, bf16, 64 crops of 224x112", "device": cpu_features().model}
        document = {**facts, "images_per_s": rates, "median": medians, "ratio": ratio}
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def measure(variant: str) -> float:
    """Return images per second of this process."""
    if variant == "kept":
        keep_freed_memory()
    student = build_student(student_config("vit_small", (224, 112)))
    init_student_weights(student, torch.Generator().manual_seed(0))
    images = torch.randn(_BATCH, 3, 224, 112)
    update(student, images)
    start = time.perf_counter()
    for _ in range(_UPDATES):
        update(student, images)
    return _BATCH * _UPDATES / (time.perf_counter() - start)


def update(student: torch.nn.Module, images: torch.Tensor) -> None:
    """Run forward and backward, and drop the gradients."""
    with autocast(images.device, "bf16"):
        loss = student(images).float().square().mean()
    loss.backward()
    student.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
