"""Milliseconds of attention, forward and backward, fused and as three plain operations, on a CPU.

    python bench/attention.py [--repeats 5] [--out bench/results/attention.json]

Shapes are those of an update at 256x128 with 16 images: student blocks 1 to 11 and block 12 on the global view, the
crowd and the local crops. models/vit.py chooses by this table.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dpal_edge.runtime.device import cpu_features

SHAPES = {  # batch, heads, tokens, width of a head
    "global": (16, 6, 129, 32),
    "global, block 12": (16, 12, 129, 16),
    "crowd": (16, 6, 257, 32),
    "local": (32, 6, 49, 32),
}


def main() -> None:
    """Time both forms in both precisions, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
            times = {form.__name__: milliseconds(form, tensors, options.repeats) for form in (fused, plain)}
            rows.append({"shape": name, "dtype": str(dtype).removeprefix("torch."), **times})
            ratio = times["fused"] / times["plain"]
            print(f"{name:18}{rows[-1]['dtype']:10}", *(f"{k} {v:7.1f} ms" for k, v in times.items()), f"{ratio:6.2f}x")
    if options.out:
        facts = {"device": cpu_features().model, "flags": list(cpu_features().flags), "torch": torch.__version__}
        facts |= {"threads": torch.get_num_threads()}
        options.out.write_text(json.dumps({**facts, "results": rows}, indent=2) + "\n", encoding="utf-8")


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel that torch chooses."""
    return F.scaled_dot_product_attention(q, k, v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Product, softmax, product."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def milliseconds(form, tensors: list[Tensor], repeats: int) -> float:
    """Median time of one forward and backward pass."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        form(*tensors).sum().backward()
        seconds.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(seconds[1:]), 2)


if __name__ == "__main__":
    main()
