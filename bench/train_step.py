"""Images per second and memory of one training update against the published step, in one run, as ratios.

    python bench/train_step.py [--batch 16] [--repeats 3] [--device cpu] [--out bench/results/train_step.json]

Every variant updates a ViT-Ti from a ViT-B/16 teacher with random weights (speed does not depend on them) at 256x128,
on the same views, in a process of its own; the processes take turns, so that all meet the same machine, and each tells
its peak memory.

- ``published``: the authors' step as docs/method.md describes it: plain float32 attention (fp16 autocast on CUDA), a
  second softmax over the values that nothing uses, a teacher that runs without ``no_grad``, five decoder calls, a shape
  mask from scikit-learn's PCA on the CPU, and a look at the loss after every update.
- ``ours float32``: the step of ``dpal-edge train`` in the same precision: what the structure alone gives.
- ``ours``: its default, which computes in bf16 where the device does so fast.
- ``ours compiled``: the same with ``--set compile=true``.
- ``ours chunked``: the default with ``--set decoder_chunk=4``, which bounds the decoder's memory.
- ``ours cached``: the default with a filled teacher cache, as from the second round of ``view_variants`` on.

The floor, in multiply-adds, is written beside the result: teacher 69 of 90 GFLOP per image. So in one precision nothing
but better kernels and fewer copies separates two steps; twice the arithmetic rate (bf16) gives at most 2x on top, and a
cached teacher leaves 21 GFLOP, at most 4.3x.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.decomposition import PCA
from torch import Tensor

from dpal_edge.models.decoder import GLOBAL, LOCAL, RELATION
from dpal_edge.models.teacher import load_teachers
from dpal_edge.models.vit import Attention, VisionTransformer, ViTConfig, init_student
from dpal_edge.runtime.device import cpu_features
from dpal_edge.train.cache import TargetCache
from dpal_edge.train.config import TrainConfig, build_config
from dpal_edge.train.distributed import World
from dpal_edge.train.loop import State, autocast, build_state, choose_device, train_step
from dpal_edge.train.method import Views
from dpal_edge.train.methods.dpal import Dpal

VARIANTS = {
    "published": {"mask": "published", "relation": "softmax", "clip": 0.0, "precision": "float32"},
    "ours float32": {"precision": "float32"},
    "ours": {},
    "ours compiled": {"compile": True},
    "ours chunked": {"decoder_chunk": 4},
    "ours cached": {"view_variants": 1, "teacher_cache": "cache"},
}


def main() -> None:
    """Let the variants take turns, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        teacher = write_teacher(Path(folder, "teacher.safetensors"))
        workers = {}
        for name in options.variants:
            ours, theirs = context.Pipe()
            settings = {**VARIANTS[name], "batch": options.batch}
            process = context.Process(target=serve, args=(theirs, name, settings, options.device, teacher), daemon=True)
            process.start()
            workers[name] = (process, ours, ours.recv())  # one after the other: each has the machine to itself
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(options.repeats):
            for name, (_, connection, _) in workers.items():
                connection.send("step")
                seconds[name].append(connection.recv())
        facts = {name: fact for name, (_, _, fact) in workers.items()}
        for name, (process, connection, _) in workers.items():
            connection.send("stop")
            facts[name]["memory_mb"] = connection.recv()
            process.join()
    report(seconds, facts, options)


def serve(connection: Connection, name: str, settings: dict, device_name: str, teacher: str) -> None:
    """Build one variant, warm it up, and time an update whenever told to."""
    if name == "published" and (
        device_name.startswith("cuda") or (device_name == "auto" and torch.cuda.is_available())
    ):
        settings["precision"] = "fp16"
    with tempfile.TemporaryDirectory() as folder:
        if "teacher_cache" in settings:
            settings["teacher_cache"] = folder
        config = build_config({**settings, "teacher": teacher, "device": device_name})
        device, precision = choose_device(config, World())
        teachers = load_teachers(config.teacher, layer=None, size=config.size).to(device)
        before = 0 if device.type == "cuda" else memory_mb(device)
        state = build_state(config, teachers, device, precision)
        views = random_views(config, device)
        if config.teacher_cache is not None:
            state.cache = TargetCache(Path(config.teacher_cache), config.batch, {})
        state.method.train()
        for _ in range(2):
            timed_step(name, state, views, config)
        connection.send({"precision": precision, "device": str(device), "threads": torch.get_num_threads()})
        while connection.recv() == "step":
            connection.send(timed_step(name, state, views, config))
        connection.send(memory_mb(device) - before)


def timed_step(name: str, state: State, views: Views, config: TrainConfig) -> float:
    """Update once; return the seconds it took."""
    start = time.perf_counter()
    if name == "published":
        Attention.forward = explicit_attention  # this process runs no other variant
        published_step(state, views)
    else:
        train_step(state, [views], progress=0.0, max_norm=config.clip)
    if state.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory_mb(device: torch.device) -> int:
    """Peak memory so far: of the device's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def published_step(state: State, images: Views) -> None:
    """One update as the authors' loop does it."""
    with autocast(state.device, state.precision):
        losses = published_losses(state.method, images)
    state.scaler.scale(losses).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    _ = losses.item()  # the published loop looks at the loss of every update


def published_losses(method: Dpal, images: Views) -> Tensor:
    """The total loss of docs/method.md 6, call by call."""
    teacher = method.teachers.teacher("global").encoder.vit
    decoder = method.decoder["768"]
    tokens, crowd_tokens = teacher(images.base), teacher(images.crowd)
    student, crowd = method.backbone(images.base), method.backbone(images.crowd)
    mask = sklearn_mask(tokens[:, 1:])
    calls = [decoder(student[:, :1], GLOBAL)]
    for view in images.local.split(len(images.base)):
        calls.append(decoder(method.backbone(view)[:, :1], GLOBAL))
    first = sum(F.mse_loss(call.tokens, tokens[:, :1]) for call in calls) / len(calls)
    calls += [decoder(student[:, 1:], LOCAL), decoder(crowd, RELATION)]
    patches, relation = calls[-2], calls[-1]
    local = F.mse_loss(mask * patches.tokens, mask * tokens[:, 1:])
    scale = tokens.shape[-1] ** 0.5
    target = (crowd_tokens @ crowd_tokens.mT / scale).softmax(-1)
    found = (relation.tokens @ relation.tokens.mT / scale).softmax(-1).log()
    divergence = F.kl_div(found, target, reduction="none").sum(-1).mean()
    router = torch.stack([call.terms["router"] for call in calls]).mean()
    penalty = torch.stack([call.terms["penalty"] for call in calls]).mean()
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


def write_teacher(path: Path) -> str:
    """Write a ViT-B/16 with random weights."""
    vit = VisionTransformer(ViTConfig(size=(224, 224), width=768, heads=12, last_heads=12))
    init_student(vit, torch.Generator().manual_seed(0))
    save_file(vit.state_dict(), path)
    return str(path)


def random_views(config: TrainConfig, device: torch.device) -> Views:
    """Normal noise in the shapes of the views: 1 global, 2 local, 1 crowd per image."""
    generator = torch.Generator().manual_seed(0)

    def noise(count: int, size: tuple[int, int]) -> Tensor:
        return torch.randn(count, 3, *size, generator=generator).to(device)

    batch = config.batch
    return Views(
        base=noise(batch, config.size),
        local=noise(2 * batch, config.local_size),
        crowd=noise(batch, config.crowd_size),
        keys=torch.arange(batch),
    )


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


def report(seconds: dict[str, list[float]], facts: dict[str, dict], options: argparse.Namespace) -> None:
    """Print a table; write it as JSON where asked."""
    floor = floor_gflop()
    rows = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        rows[name] = {
            "images_per_s": round(options.batch / median, 3),
            "ratio": round(statistics.median(seconds["published"]) / median, 2) if "published" in seconds else None,
            "memory_mb": facts[name]["memory_mb"],
            "precision": facts[name]["precision"],
            "step_s": {"min": min(values), "median": median, "max": max(values)},
        }
    first = next(iter(facts.values()))
    cuda = first["device"].startswith("cuda")
    result = {
        "what": "images/s of one update, ViT-B/16 -> ViT-Ti, 256x128; memory beyond the loaded teacher",
        "batch": options.batch,
        "device": torch.cuda.get_device_name() if cuda else cpu_features().model,
        "flags": [] if cuda else list(cpu_features().flags),
        "threads": first["threads"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "floor_gflop_per_image": round(floor, 1),
        "results": rows,
    }
    print(f"{'variant':16}{'images/s':>10}{'ratio':>8}{'TFLOP/s':>10}{'memory':>10}  precision")
    for name, row in rows.items():
        rate = row["images_per_s"]
        print(
            f"{name:16}{rate:10.2f}{row['ratio'] or 0:8.2f}{rate * floor / 1e3:10.2f}{row['memory_mb']:8} MB"
            f"  {row['precision']}"
        )
    print("(TFLOP/s: of the whole step's floor; a cached teacher skips most of it)")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
