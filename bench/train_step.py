"""Images per second of one training update against the published step, in one run, as a ratio.

    python bench/train_step.py [--batch 16] [--repeats 3] [--out bench/results/train_step.json]

The published-style step is written as docs/method.md describes the authors' code: plain float32 attention, a second
softmax over the values that nothing uses, a teacher that runs without ``no_grad``, five decoder calls, and a shape
mask from scikit-learn's PCA on the CPU. Ours is the step of ``dpal-edge train`` at its default settings. Both update a
ViT-Ti from a ViT-B/16 teacher with random weights (speed does not depend on them) at 256x128, on the same views. The
floor, in multiply-adds, is written beside the result.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor

from dpal_edge.models.decoder import GLOBAL, LOCAL, RELATION
from dpal_edge.models.teacher import IMAGENET_MEAN, IMAGENET_STD, Passport, Teacher
from dpal_edge.models.vit import Attention, VisionTransformer, ViTConfig
from dpal_edge.runtime.device import cpu_features
from dpal_edge.train.config import TrainConfig, build_config
from dpal_edge.train.dpal import Dpal, Images
from dpal_edge.train.loop import State, build_state, choose_device, train_step


def main() -> None:
    """Time both steps in turns, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    config = build_config({"batch": options.batch, "device": options.device})
    device, precision = choose_device(config)
    teacher = random_teacher().to(device)
    ours = build_state(config, teacher, device, precision)
    published_config = build_config({**config.to_dict(), "mask": "published", "relation": "softmax", "clip": 0.0})
    published = build_state(published_config, teacher, device, "float32")
    images = random_views(config, device)

    steps = {
        "published": lambda: published_step(published, images),
        "dpal-edge": lambda: train_step(ours, images, progress=0.0, max_norm=config.clip),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats + 1):  # the first round warms up
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    report(seconds, options, str(device), precision)


def published_step(state: State, images: Images) -> None:
    """One update as the authors' loop does it."""
    fused = Attention.forward
    Attention.forward = explicit_attention  # type: ignore[method-assign]
    try:
        losses = published_losses(state.method, images)
        losses.backward()
    finally:
        Attention.forward = fused  # type: ignore[method-assign]
    state.optimizer.step()
    state.optimizer.zero_grad()
    _ = losses.item()  # the published loop looks at the loss of every update


def published_losses(method: Dpal, images: Images) -> Tensor:
    """The total loss of docs/method.md 6, call by call."""
    teacher = method.teacher.model
    tokens, crowd_tokens = teacher(images.base), teacher(images.crowd)
    student, crowd = method.backbone(images.base), method.backbone(images.crowd)
    mask = sklearn_mask(tokens[:, 1:])
    calls = [method.decoder(student[:, :1], GLOBAL)]
    for view in images.local.split(len(images.base)):
        calls.append(method.decoder(method.backbone(view)[:, :1], GLOBAL))
    first = sum(F.mse_loss(call.tokens, tokens[:, :1]) for call in calls) / len(calls)
    calls += [method.decoder(student[:, 1:], LOCAL), method.decoder(crowd, RELATION)]
    patches, relation = calls[-2], calls[-1]
    local = F.mse_loss(mask * patches.tokens, mask * tokens[:, 1:])
    scale = tokens.shape[-1] ** 0.5
    target = (crowd_tokens @ crowd_tokens.mT / scale).softmax(-1)
    found = (relation.tokens @ relation.tokens.mT / scale).softmax(-1).log()
    divergence = F.kl_div(found, target, reduction="none").sum(-1).mean()
    router = torch.stack([call.router_loss for call in calls]).mean()
    penalty = torch.stack([call.penalty for call in calls]).mean()
    return first + local + divergence + 0.1 * router + penalty


def explicit_attention(self: Attention, x: Tensor) -> Tensor:
    """Attention as the authors write it, with the softmax over the values that their head revision never uses."""
    batch, count, width = x.shape
    qkv = self.qkv(x).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    scale = (width // self.heads) ** -0.5
    attention = (q @ k.transpose(-2, -1) * scale).softmax(dim=-1)
    _ = (v @ v.transpose(-2, -1) * scale).softmax(dim=-1)
    mixed = (attention @ v).transpose(1, 2).reshape(batch, count, width)
    return self.proj(mixed)


def sklearn_mask(patches: Tensor) -> Tensor:
    """The shape mask by PCA on the CPU and back."""
    points = patches.detach().flatten(0, 1).cpu().numpy()
    scores = PCA(n_components=1).fit_transform(points)
    scores = (scores - scores.min()) / (scores.max() - scores.min())
    return torch.from_numpy(scores.astype(np.float32)).view(*patches.shape[:2], 1).to(patches.device)


def random_teacher() -> Teacher:
    """A ViT-B/16 at 256x128 with random weights."""
    config = ViTConfig(width=768, heads=12, last_heads=12, pos_interp="2d-dino")
    vit = VisionTransformer(config)
    torch.nn.init.normal_(vit.pos_embed, std=0.02)
    passport = Passport(
        spec="random ViT-B/16",
        sha256=None,
        keys_matched=1.0,
        parameters=sum(p.numel() for p in vit.parameters()),
        patch_size=16,
        width=768,
        layer=12,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        licence="none",
    )
    return Teacher(vit, vit, passport, 16)


def random_views(config: TrainConfig, device: torch.device) -> Images:
    """Normal noise in the shapes of the views: 1 global, 2 local, 1 crowd per image."""
    generator = torch.Generator().manual_seed(0)

    def noise(count: int, size: tuple[int, int]) -> Tensor:
        return torch.randn(count, 3, *size, generator=generator).to(device)

    base, local, crowd = config.size, config.local_size, config.crowd_size
    return Images(noise(config.batch, base), noise(2 * config.batch, local), noise(config.batch, crowd))


def floor_gflop() -> float:
    """Billions of operations per image that no step can avoid: matrix products, one multiply-add being two.

    Teacher forward on 129 and 257 tokens; student forward and backward (three times forward) on 129, 257 and two times
    49; the decoder's expert matrix for five calls of three queries, forward and backward.
    """

    def vit(width: int, tokens: int) -> float:
        return 12 * (12 * width**2 * tokens + 2 * width * tokens**2) + 768 * width * tokens

    teacher = vit(768, 129) + vit(768, 257)
    student = 3 * (vit(192, 129) + vit(192, 257) + 2 * vit(192, 49))
    decoder = 3 * 5 * 3 * 192 * 192 * 768
    return 2 * (teacher + student + decoder) / 1e9


def report(seconds: dict[str, list[float]], options: argparse.Namespace, device: str, precision: str) -> None:
    """Print a table; write it as JSON where asked."""
    floor = floor_gflop()
    rows = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        rate = options.batch / median
        rows[name] = {
            "images_per_s": round(rate, 3),
            "step_s": {"min": min(values), "median": median, "max": max(values)},
            "gflop_per_s": round(rate * floor, 1),
        }
    ratio = rows["dpal-edge"]["images_per_s"] / rows["published"]["images_per_s"]
    result = {
        "what": "images/s of one update, ViT-B/16 -> ViT-Ti, 256x128",
        "batch": options.batch,
        "device": device if device != "cpu" else cpu_features().model,
        "threads": torch.get_num_threads(),
        "precision": {"published": "float32", "dpal-edge": precision},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "floor_gflop_per_image": round(floor, 1),
        "peak_memory_mb_of_both": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "results": rows,
        "ratio": round(ratio, 2),
    }
    for name, row in rows.items():
        print(f"{name:10} {row['images_per_s']:8.2f} images/s {row['gflop_per_s']:8.0f} GFLOP/s of useful work")
    print(f"ratio      {ratio:8.2f}    ({result['device']}, batch {options.batch}, ours in {precision})")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
