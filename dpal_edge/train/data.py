"""Images, turned into batches of views.

An epoch is a permutation of pairs of images. The views of a pair are a function of the seed, the variant and the pair
alone: whoever is pasted into a crowd, and the blurred background where there is no other, is the partner. So a batch
may be split in any way over processes, passes and workers, and a run may stop and go on anywhere: the same images get
the same views.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from io import BytesIO

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dpal_edge.errors import ConfigError, DataError
from dpal_edge.tasks.image import unreadable, upright
from dpal_edge.train import views
from dpal_edge.train.config import TrainConfig
from dpal_edge.train.sources import ImageSource, open_source
from dpal_edge.train.views import Box, Cut, Pixels

LOCAL_CROPS = 2
MASK_PATCH = 16  # pixels; side of the patches that ``masked`` hides
MASK_SHARE = 0.5
_PASTED = 2  # people in a crowd
_UNREADABLE: tuple[type[Exception], ...] = (*unreadable(), DataError)
_TRIES = 20  # images tried in place of an unreadable one before giving up
_SPLIT, _VIEWS, _ORDER, _PAIRS = 1, 2, 3, 4  # streams of the seed
_BASE, _LOCAL, _CROWD, _MASK = range(4)  # streams of an image: what one view draws does not depend on the others

Picture = tuple[ImageSource, int]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The views of B people, uint8 RGB; what was not asked for is None.

    With ``looks`` colours are still to be changed, and people still to be pasted, on the device (augment.py).
    """

    keys: Tensor  # (B,) int64: number of the (image, views), the same whenever they come again
    base: Tensor  # (B, 3, H, W)
    local: Tensor | None = None  # (LOCAL_CROPS * B, 3, h, w), all first crops before all second ones
    crowd: Tensor | None = None  # (B, 3, Hc, Wc)
    clean: Tensor | None = None  # (B, 3, H, W): ``base`` without its look
    masked: Tensor | None = None  # (B, N) bool: patches of ``base`` to hide, MASK_SHARE of every even image
    looks: dict[str, Tensor] = field(default_factory=dict)  # of base, local, crowd: (images, columns) float32
    boxes: Tensor | None = None  # (B, _PASTED, 4) int64: views.Box in ``crowd``; nobody where the height is 0
    partners: Tensor | None = None  # (B,) int64: row of ``base`` pasted second; None if each image is pasted twice
    skipped: tuple[tuple[str, str], ...] = ()  # unreadable image, reason

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from which copies to a GPU run beside computation."""
        return self._mapped(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on ``device`` without waiting for the copy; the keys stay on the host."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and name != "keys"}
        mapped = {id(value): function(value) for value in tensors.values()}  # once where ``clean`` is ``base``
        looks = {name: function(value) for name, value in self.looks.items()}
        return replace(self, looks=looks, **{name: mapped[id(value)] for name, value in tensors.items()})  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Place:
    """An image in the order, and which of its views."""

    image: int  # index in the source
    variant: int
    number: int  # within the variant
    seed: int

    def generator(self, stream: int) -> Generator:
        return np.random.default_rng([self.seed, _VIEWS, self.variant, self.number, stream])


@dataclass(frozen=True)
class _Scene:
    """Where a crowd takes place; drawn before anything is read, so that a batch is read at once."""

    rng: Generator  # for what follows
    picture: Picture | None  # a real crowd or a background; None is the partner's image, blurred
    real: bool


@dataclass(frozen=True)
class _Shown:
    """A cut and its pixels: with its look, or without where the device will give it."""

    cut: Cut
    pixels: Pixels


@dataclass(frozen=True)
class _Row:
    """The views of one image."""

    base: _Shown
    local: list[_Shown]
    crowd: _Shown | None
    boxes: list[Box]  # of people in the crowd


def split_validation(source: ImageSource, count: int, seed: int) -> tuple[ImageSource, ImageSource]:
    """Split into training and ``count`` validation images, at most a tenth of all; the same for one seed."""
    held_out = np.zeros(len(source), bool)
    order = np.random.default_rng([seed, _SPLIT]).permutation(len(source))
    held_out[order[: min(count, len(source) // 10)]] = True
    return source.subset(np.flatnonzero(~held_out)), source.subset(np.flatnonzero(held_out))


class PersonBatches(Dataset[Batch]):
    """Item ``i`` is what process ``rank`` of ``world`` sees in pass ``i % accumulate`` of update ``i // accumulate``.

    Epochs follow each other without a gap. Of an odd number of images one stays out, another one in each variant.
    """

    def __init__(
        self,
        source: ImageSource,
        config: TrainConfig,
        views: tuple[str, ...] = ("base",),
        *,
        batch: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Prepare to make ``views`` of the images of ``source``.

        Args:
            source: at least one image.
            config: with ``augment`` resolved (augment.resolve_augment); ``auto`` is workers here.
            views: names of fields of Batch; ``base`` is always made, and crowds of one person twice bring ``local``.
            batch: images of an item; None is an equal part of ``config.batch``.
            rank: of this process.
            world: number of processes.

        Raises:
            ConfigError: the batch cannot be divided by passes and processes.
            DataError: crowds or backgrounds are missing.
        """
        parts = config.accumulate * world
        if batch is None and config.batch % parts:
            raise ConfigError(
                f"batch is {config.batch}, expected a multiple of {parts}: accumulate={config.accumulate} passes in "
                f"each of {world} processes"
            )
        twice = "crowd" in views and config.crowd == "self"
        self.source, self.config = source, config
        self.views = (*views, "local") if twice and "local" not in views else views
        self.batch = batch or config.batch // parts
        self.rank, self.world = rank, world
        self.crowds = open_source(config.crowd_data if "crowd" in views else ())
        self.backgrounds = open_source(config.backgrounds if "crowd" in views else ())
        self._group = min(2, len(source))  # images that stay together; a lonely one is its own partner
        # The device pastes people of the same batch, and an odd batch lacks a partner.
        self._later = config.augment == "device" and self.batch % 2 == 0 and self._group == 2

    def __getitem__(self, index: int) -> Batch:
        """Decode, crop, augment and compose item ``index``.

        Raises:
            DataError: twenty images, tried one in place of the other, are unreadable.
        """
        wanted, group = self._positions(index), self._group
        # Whole pairs, so that no view depends on how the order is cut into batches.
        start, stop = wanted.start - wanted.start % group, wanted.stop + -wanted.stop % group
        places = [self._place(position) for position in range(start, stop)]
        scenes = [self._scene(place) for place in places] if "crowd" in self.views else []
        images = _Images([*((self.source, place.image) for place in places), *(scene.picture for scene in scenes)])
        rows: list[_Row] = []
        for first in range(0, len(places), group):  # one pair after the other, so that few decoded images are in memory
            members = range(first, first + group)
            people = [images.decode(i) for i in members]
            backdrops = [images.decode(len(places) + i) if scenes[i].picture else None for i in members if scenes]
            rows += self._pair(places[first : first + group], people, scenes[first : first + group], backdrops)
        kept = slice(wanted.start - start, wanted.stop - start)
        return self._collate(places[kept], rows[kept], images.skipped)

    def names(self, index: int) -> list[str]:
        """Return the images of item ``index`` by name, without reading them."""
        return [self.source.names[self._place(position).image] for position in self._positions(index)]

    def _positions(self, index: int) -> range:
        """Return where item ``index`` lies in the order: processes side by side in a pass, passes in an update."""
        start = (index * self.world + self.rank) * self.batch
        return range(start, start + self.batch)

    @property
    def _epoch(self) -> int:
        """Images of an epoch."""
        return len(self.source) - len(self.source) % self._group

    def _place(self, position: int) -> _Place:
        seed, group = self.config.order_seed, self._group
        epoch, place = divmod(position, self._epoch)
        variant = epoch % self.config.view_variants if self.config.view_variants else epoch
        pair = int(_permutation(self._epoch // group, seed, _PAIRS, epoch)[place // group])
        number = group * pair + place % group
        return _Place(int(_permutation(len(self.source), seed, _ORDER, variant)[number]), variant, number, seed)

    def _scene(self, place: _Place) -> _Scene:
        rng = place.generator(_CROWD)
        real = bool(rng.random() < {"paste": 0.0, "mixed": 0.5, "real": 1.0}[self.config.crowd_source])
        source = self.crowds if real else self.backgrounds
        return _Scene(rng, (source, int(rng.integers(len(source)))) if len(source) else None, real)

    def _pair(
        self,
        places: list[_Place],
        people: list[Image.Image],
        scenes: list[_Scene],
        backdrops: list[Image.Image | None],
    ) -> list[_Row]:
        """Make the views of images that stay together; without ``scenes``, no crowds."""
        base = [self._base(place, image) for place, image in zip(places, people, strict=True)]
        local = [self._local(place, image) for place, image in zip(places, people, strict=True)]
        if not scenes:
            return [_Row(base[i], local[i], None, []) for i in range(len(places))]
        rows = []
        for i, scene in enumerate(scenes):
            if self.config.crowd == "self":
                pasted = [local[i][-1].pixels, views.nearest(base[i].pixels, self.config.local_size)]
            else:
                pasted = [base[i].pixels, base[i - 1].pixels]
            crowd, boxes = self._crowd(scene, backdrops[i] or views.blurred(people[i - 1]), pasted)
            rows.append(_Row(base[i], local[i], crowd, boxes))
        return rows

    def _base(self, place: _Place, image: Image.Image) -> _Shown:
        return self._show(views.global_cut(image, self.config.size, place.generator(_BASE)))

    def _local(self, place: _Place, image: Image.Image) -> list[_Shown]:
        config, rng = self.config, place.generator(_LOCAL)
        count = LOCAL_CROPS if "local" in self.views else 0
        return [self._show(views.local_cut(image, config.local_size, config.size, rng)) for _ in range(count)]

    def _crowd(self, scene: _Scene, image: Image.Image, people: list[Pixels]) -> tuple[_Shown, list[Box]]:
        config, rng = self.config, scene.rng
        cut = views.crowd_cut if scene.real else views.background_cut
        shown = self._show(cut(image, config.crowd_size, rng))
        if scene.real:
            return shown, [(0, 0, 0, 0)] * _PASTED
        if config.crowd == "self":
            boxes = views.twin_boxes(config.crowd_size, config.local_size, rng)
        else:
            boxes = views.crowd_boxes(config.crowd_size, config.size, _PASTED, rng)
        return (shown if self._later else _Shown(shown.cut, views.paste(shown.pixels, people, boxes))), boxes

    def _show(self, cut: Cut) -> _Shown:
        return _Shown(cut, cut.plain() if self._later else cut.pixels())

    def _collate(self, places: list[_Place], rows: list[_Row], skipped: dict[str, str]) -> Batch:
        """Stack the views that were asked for."""
        base = [row.base for row in rows]
        local = [row.local[k] for k in range(LOCAL_CROPS) for row in rows if row.local]
        crowd = [row.crowd for row in rows if row.crowd]
        images = {name: _stack(shown) for name, shown in (("base", base), ("local", local), ("crowd", crowd)) if shown}
        if "clean" in self.views:
            images["clean"] = images["base"] if self._later else _tensor([shown.cut.plain() for shown in base])
        if "masked" in self.views:
            images["masked"] = self._masks(places)
        batch = Batch(
            keys=torch.tensor([place.variant * self._epoch + place.number for place in places]),
            skipped=tuple(skipped.items()),
            **images,  # type: ignore[arg-type]
        )
        if not self._later:
            return batch
        looks = {"base": _looks(base), "local": _looks(local), "crowd": _looks(crowd)}
        return replace(
            batch,
            looks={name: rows for name, rows in looks.items() if len(rows)},
            boxes=torch.tensor([row.boxes for row in rows]) if crowd else None,
            partners=torch.arange(len(rows)) ^ 1 if crowd and self.config.crowd == "others" else None,
        )

    def _masks(self, places: list[_Place]) -> Tensor:
        rows, columns = (side // MASK_PATCH for side in self.config.size)
        masks = np.zeros((len(places), rows * columns), bool)
        for mask, place in zip(masks[::2], places[::2], strict=True):
            mask[:] = views.block_mask((rows, columns), int(MASK_SHARE * rows * columns), place.generator(_MASK))
        return torch.from_numpy(masks)


class _Images:
    """Images of a batch: read all at once, decoded one by one."""

    def __init__(self, pictures: Sequence[Picture | None]) -> None:
        self.skipped: dict[str, str] = {}  # what could not be decoded and why
        self._pictures = {i: picture for i, picture in enumerate(pictures) if picture}
        self._blobs: dict[int, bytes | DataError] = {}
        for source in {source for source, _ in self._pictures.values()}:
            wanted = {i: index for i, (its, index) in self._pictures.items() if its is source}
            self._blobs.update(zip(wanted, source.read(list(wanted.values())), strict=True))

    def decode(self, i: int) -> Image.Image:
        """Decode picture ``i``, or another of its source in its place.

        Raises:
            DataError: twenty are unreadable.
        """
        source, index = self._pictures[i]
        tries = min(_TRIES, len(source))
        for attempt in range(tries):
            # Evenly spread, because an interrupted copy leaves its empty files side by side.
            other = (index + attempt * (len(source) // tries)) % len(source)
            try:
                return _decoded(source.read([other])[0] if attempt else self._blobs.pop(i))
            except _UNREADABLE as error:
                kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
                reason = self.skipped[source.names[other]] = f"{kind}{error}".strip().splitlines()[0][:100]
        raise DataError(
            f"{source.names[other]}: cannot be read, nor can {tries - 1} others tried in its place ({reason}); "
            f"are these really images?"
        )


def _decoded(blob: bytes | DataError) -> Image.Image:
    if isinstance(blob, DataError):
        raise blob
    with Image.open(BytesIO(blob)) as image:
        image.draft("RGB", (1024, 1024))  # large JPEGs decode several times faster at a reduced scale
        decoded: Image.Image = upright(image, "RGB")
        return decoded


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, stream: int, number: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, stream, number]).permutation(count)


def _stack(shown: list[_Shown]) -> Tensor:
    return _tensor([one.pixels for one in shown])


def _tensor(images: list[Pixels]) -> Tensor:
    """Stack (H, W, 3) arrays into one (n, 3, H, W) tensor; to reorder its memory is left to the device."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def _looks(shown: list[_Shown]) -> Tensor:
    return torch.tensor([one.cut.look.row() for one in shown])
