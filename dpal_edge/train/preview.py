"""A run tried out before it begins: what an update costs, what the views look like, and what would not fit."""

import math
import os
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dpal_edge.files import atomic_path
from dpal_edge.models.vit import IMAGENET_MEAN, IMAGENET_STD
from dpal_edge.train.augment import resolve_augment, to_views
from dpal_edge.train.cache import bytes_needed
from dpal_edge.train.config import TrainConfig
from dpal_edge.train.data import LOCAL_CROPS, MASK_PATCH, PersonBatches
from dpal_edge.train.distributed import World
from dpal_edge.train.loop import DTYPES, State, TimedLoader, train
from dpal_edge.train.method import Method, Views
from dpal_edge.train.methods.dpal import Dpal
from dpal_edge.train.panel import opening
from dpal_edge.train.saver import state_tensors
from dpal_edge.train.setup import Setup, prepare, worker_count

_PEOPLE = 8  # rows of the contact sheet
_HEIGHT, _GAP, _LINE = 160, 6, 14  # pixels: of a view on it, between views, of a line of text
_MEASURED = 3  # updates after a first, slower one
_ENOUGH_S = 20.0  # no further update is measured after these
_VEIL = (40, 70, 190)  # RGB
_MOST_MEMORY = 0.9  # share of what is there
_MOST_WAIT = 0.05  # share of the time

Pixels = NDArray[np.uint8]  # (height, width, 3) RGB


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run would take, in seconds and bytes."""

    updates: int  # still to do
    images: int  # to train on
    batch: int  # images of an update, over all processes
    processes: int
    workers: int  # that make data for each process
    update_s: float  # to compute an update
    batch_s: float  # that one worker needs for what a process sees of an update
    device: str
    memory: int  # at most, of one process
    memory_there: int
    kept: dict[str, int]  # by part of the method: what one pass keeps for its backward pass
    disk: int  # of as many checkpoints as there ever are at a time
    cache: int  # of the teachers' targets, when full
    disk_there: int

    @property
    def wait(self) -> float:
        """Share of the time that an update waits for data, 0..1."""
        if self.workers == 0:
            return self.batch_s / (self.batch_s + self.update_s)
        return max(0.0, 1 - self.update_s * self.workers / self.batch_s)

    @property
    def pace_s(self) -> float:
        """Time from update to update."""
        return self.update_s / (1 - self.wait)


def dry_run(config: TrainConfig, run: Path, *, resume: bool, processes: int, say: Callable[[str], object]) -> str:
    """Build everything as a run does, update a few times, draw the views; keep nothing but ``views.png``.

    With several ``processes`` it measures the part of one, without what they exchange.

    Returns:
        What was found and what to change if it does not fit, in a few lines.

    Raises:
        ConfigError, DataError, ModelFileError: as run_training; also if memory is too small.
    """
    setup = prepare(config, run, World(), resume=resume)
    for line in opening(setup.facts()):
        say(line)
    sheet = run / "views.png"
    write_sheet(sheet, setup)
    estimate = measure(setup, run, processes)
    return "\n".join(
        [
            *describe(estimate),
            f"views     {_PEOPLE} people, as training sees them: {sheet}",
            *advise(estimate, setup.config),
        ]
    )


def measure(setup: Setup, run: Path, processes: int = 1) -> Estimate:
    """Update a few times on real data and look at clock, memory and disk; what the updates learn is of no use."""
    config, state = setup.config, setup.state
    state.cache = None  # a run fills it in its first passes, which are the slow ones
    batches = setup.batches(processes)
    steps = range(state.step, state.step + 1 + _MEASURED)
    updates = config.steps - state.step
    with TimedLoader(batches, steps, workers=0, device=state.device, accumulate=config.accumulate) as loader:
        iterator = iter(train(state, loader, config))
        with nullcontext(Counter[str]()) if config.compile else _count_kept(state.method) as kept:
            next(iterator)
        update_s, batch_s = _time_updates(iterator, loader, state.device)
    memory, memory_there = _memory(state.device)
    disk = sum(value.numel() * value.element_size() for value in state_tensors(state).values())
    return Estimate(
        updates=updates,
        images=len(setup.data.train),
        batch=config.batch,
        processes=processes,
        workers=worker_count(config, state.device, processes),
        update_s=update_s,
        batch_s=batch_s,
        device=str(state.device),
        memory=memory,
        memory_there=memory_there,
        kept=dict(kept),
        disk=disk * (config.keep + 1),  # a new one is written before the oldest goes
        cache=_cache_bytes(setup, batches),
        disk_there=shutil.disk_usage(_existing(run)).free,
    )


def describe(estimate: Estimate) -> list[str]:
    """Say in a line each what time, data, memory and disk a run takes."""
    e = estimate
    rest, epoch = (timedelta(seconds=math.ceil(e.pace_s * updates)) for updates in (e.updates, e.images / e.batch))
    each = (
        f", {e.batch // e.processes} of its {e.batch} images by each of {e.processes} processes"
        if e.processes > 1
        else ""
    )
    workers = f"with {e.workers} {'workers' if e.workers > 1 else 'worker'}" if e.workers else "without workers"
    kept = ", ".join(f"{name} {_size(count)}" for name, count in e.kept.items())
    lines = [
        f"time      {e.update_s:.3g} s to compute an update{each}; {e.batch / e.pace_s:.1f} images/s; {e.updates} "
        f"updates take {rest}, an epoch of {e.images} images {epoch}",
        f"data      {e.batch_s:.3g} s for one worker to make what a process needs for an update; {workers} "
        f"{100 * e.wait:.0f} % of the time is spent waiting for it",
        f"memory    {_size(e.memory)} of {_size(e.memory_there)} on {e.device}"
        + (f"; of it a pass keeps for its way back: {kept}" if kept else ""),
        f"disk      {_size(e.disk)} for checkpoints, of {_size(e.disk_there)} that are free",
    ]
    return lines + ([f"cache     {_size(e.cache)} for all that the teachers say"] if e.cache else [])


def advise(estimate: Estimate, config: TrainConfig) -> list[str]:
    """Name the settings to change where something does not fit; one line if all does."""
    e, advice = estimate, []
    if e.memory > _MOST_MEMORY * e.memory_there:
        advice.append(
            f"memory is tight: --set accumulate={2 * config.accumulate} halves what a pass takes at the same batch"
        )
    if e.wait > _MOST_WAIT:
        wanted = math.ceil(e.batch_s / e.update_s)
        more = f"--set workers={wanted} (there are {os.cpu_count()} cores)"
        advice.append(f"data are too slow: {more}, smaller image files, or --set augment=device on a GPU")
    if e.disk + e.cache > e.disk_there:
        less = "lower view_variants or leave teacher_cache out, " if e.cache else ""
        advice.append(f"the disk is too small: {less}--set keep=1, or another --out")
    return [f"change    {line}" for line in advice] or ["fits      nothing needs to change"]


def write_sheet(path: Path, setup: Setup) -> None:
    """Draw the views of a few people of the first batch as a PNG: a row for each, a column for each kind of view."""
    state, source = setup.state, setup.data.train
    batches = PersonBatches(
        source, resolve_augment(setup.config, state.device), state.method.views, batch=min(_PEOPLE, len(source))
    )
    views = to_views(batches[0], state.device)
    columns = [(title, [_fit(image) for image in images]) for title, images in _columns(views, state)]
    names = ["/".join(Path(name).parts[-2:]) for name in batches.names(0)]
    widths = [images[0].width for _, images in columns]
    step = _HEIGHT + _LINE + _GAP
    sheet = Image.new("RGB", (sum(widths) + _GAP * (len(widths) + 1), _LINE + _GAP + step * len(names)), "white")
    draw = ImageDraw.Draw(sheet)
    left = _GAP
    for (title, images), width in zip(columns, widths, strict=True):
        draw.text((left, 2), title, fill="black")
        for i, image in enumerate(images):
            sheet.paste(image, (left, _LINE + _GAP + i * step + _LINE))
        left += width + _GAP
    for i, name in enumerate(names):
        draw.text((_GAP, _LINE + _GAP + i * step), name, fill="gray")
    with atomic_path(path) as temporary:
        sheet.save(temporary)


def _columns(views: Views, state: State) -> Iterator[tuple[str, list[Pixels]]]:
    """Yield a title and an image of each person for all views that the method looks at."""
    base = _pixels(views.base)
    yield "base", base
    if (mask := _shape_mask(views, state)) is not None:
        yield "mask", [_veiled(image, shown) for image, shown in zip(base, mask, strict=True)]
    if views.local is not None:
        for i, crops in enumerate(views.local.chunk(LOCAL_CROPS)):
            yield f"local {i + 1}", _pixels(crops)
    if views.crowd is not None:
        yield "crowd", _pixels(views.crowd)
    if views.clean is not None:
        yield "clean", _pixels(views.clean)
    if views.masked is not None:
        grid = [side // MASK_PATCH for side in views.base.shape[-2:]]
        hidden = 1 - views.masked.float().view(-1, *grid).cpu().numpy()
        yield "hidden", [_veiled(image, shown) for image, shown in zip(base, hidden, strict=True)]


@torch.no_grad()
def _shape_mask(views: Views, state: State) -> NDArray[np.float32] | None:
    """Return DPAL's shape mask (B, rows, columns) in 0..1; None where no loss looks at one."""
    method = state.method
    if not isinstance(method, Dpal) or method.mask is None:
        return None
    patches = method.teachers(views.base, ("local",))["local"]
    side = math.isqrt(math.prod(views.base.shape[-2:]) // patches.shape[1])
    rows, columns = (length // side for length in views.base.shape[-2:])
    method.mask.eval()
    mask: NDArray[np.float32] = method.mask(patches, (rows, columns)).view(-1, rows, columns).cpu().numpy()
    method.mask.train()
    return mask


def _pixels(images: Tensor) -> list[Pixels]:
    """Undo the normalisation of (B, 3, H, W)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    shown = (images.float().cpu() * std + mean).clamp(0, 1) * 255
    return list(shown.round().byte().permute(0, 2, 3, 1).numpy())


def _veiled(image: Pixels, shown: NDArray[np.float32]) -> Pixels:
    """Cover ``image`` with blue where ``shown`` (rows, columns), a value in 0..1 for each patch, is low."""
    side = image.shape[0] // shown.shape[0]
    clear = np.kron(0.2 + 0.8 * shown, np.ones((side, side)))[..., None]
    veiled: Pixels = np.rint(image * clear + np.array(_VEIL) * (1 - clear)).astype(np.uint8)
    return veiled


def _fit(image: Pixels) -> Image.Image:
    rows, columns = image.shape[:2]
    return Image.fromarray(image).resize((round(columns * _HEIGHT / rows), _HEIGHT), Image.Resampling.BICUBIC)


@contextmanager
def _count_kept(method: Method) -> Iterator[Counter[str]]:
    """Count what autograd keeps in one pass, by the part of ``method`` that it comes from; parameters do not count."""
    kept: Counter[str] = Counter()
    inside = ["losses"]  # what is being computed
    counting = True
    known = {value.untyped_storage().data_ptr() for value in method.parameters()}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if counting and storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            kept[inside[-1]] += storage.nbytes()
        return value

    def leave(*_: object) -> None:
        inside.pop()

    def stop(*_: object) -> None:
        nonlocal counting
        counting = False

    parts = {
        module: name
        for name, part in method.named_children()
        for module in (part.children() if isinstance(part, nn.ModuleDict) else (part,))
    }
    with ExitStack() as stack:
        for module, name in parts.items():
            stack.callback(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.callback(method.register_forward_hook(stop).remove)
        stack.enter_context(saved_tensors_hooks(pack, lambda value: value))
        yield kept


def _time_updates(iterator: Iterator[object], loader: TimedLoader, device: torch.device) -> tuple[float, float]:
    """Return the least times that computing an update, and making its data, took."""
    computed: list[float] = []
    waited: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < _ENOUGH_S and len(computed) < _MEASURED:
        start, earlier = time.perf_counter(), loader.waited_s
        next(iterator)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        waited.append(loader.waited_s - earlier)
        computed.append(time.perf_counter() - start - waited[-1])
    return min(computed), min(waited)


def _memory(device: torch.device) -> tuple[int, int]:
    """Return the most memory that was used so far, and what is there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, min(there, int(text)) if text.isdigit() else there


def _cache_bytes(setup: Setup, batches: PersonBatches) -> int:
    """Return the size of the full cache of what the teachers say, 0 if none is asked for."""
    config, state = setup.config, setup.state
    if config.teacher_cache is None or config.view_variants is None:
        return 0
    with torch.no_grad():
        targets = state.method.targets(to_views(batches[0], state.device))
    shapes = {name: tuple(value.shape[1:]) for name, value in targets.items()}
    return bytes_needed(config.view_variants * len(setup.data.train), shapes, DTYPES[state.precision])


def _existing(path: Path) -> Path:
    """Return ``path``, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
