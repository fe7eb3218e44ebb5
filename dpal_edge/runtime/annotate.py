"""Draw people on a frame: boxes with their tracks, joints, the parts of bodies and clothes, attributes."""

import colorsys
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from dpal_edge.runtime.opencv import load_opencv
from dpal_edge.runtime.person import Person
from dpal_edge.runtime.preprocess import pixel_boxes

_Color = tuple[int, int, int]  # blue, green, red
_Plate = tuple[int, int, int, int]  # left, top, right, bottom in pixels

_GOLDEN_RATIO = 0.618034  # steps through the hues so that neighbouring numbers differ most
_GREY, _BLACK, _WHITE, _DARK = (200, 200, 200), (0, 0, 0), (255, 255, 255), (36, 30, 28)
_TINT = 0.45  # weight of a class's colour over the picture
_BACKGROUND = "background"
_LEFT, _RIGHT, _MIDDLE = (60, 170, 255), (255, 190, 70), (235, 235, 235)  # of a person's body: amber, sky blue, white
_TALL = 220  # pixels of height from which a person's skeleton has its full thickness
_LABEL, _CAPTION = 0.5, 0.4  # sizes of text
_SEEN = 0.3  # confidence of joints that are drawn
_LIKELY, _MOST_ATTRIBUTES = 0.5, 3  # probability of attributes that are told, and how many

# Joints that a line connects where a skeleton has both: COCO's 17, LSP's and CrowdPose's 14, and others by these names.
_SIDE_LIMBS = (
    ("nose", "eye"), ("eye", "ear"), ("ear", "shoulder"), ("neck", "shoulder"), ("shoulder", "elbow"),
    ("elbow", "wrist"), ("shoulder", "hip"), ("hip", "knee"), ("knee", "ankle"),
)  # fmt: skip
_MIDDLE_LIMBS = (("head_top", "neck"), ("left_shoulder", "right_shoulder"), ("left_hip", "right_hip"))
_SINGLE = ("nose", "neck")


LAYERS = ("box", "pose", "parsing", "attributes")  # what can be drawn


def draw(frame: NDArray[np.uint8], people: Sequence[Person], *, layers: Collection[str] = LAYERS) -> NDArray[np.uint8]:
    """Return a copy of a (H, W, 3) BGR frame with what is known about each person, of the ``layers`` that are wanted.

    A rectangle in the track's colour and a label ("#3 0.87": track, score); parsing as a tint per class; joints with
    their limbs, amber on a person's left and blue on the right; the likeliest attributes in words. Lines and text
    scale with the frame.
    """
    canvas = _Canvas(frame)
    boxes = pixel_boxes(np.array([person.box for person in people], np.float32).reshape(-1, 4), frame.shape).tolist()
    placed = list(zip(people, boxes, strict=True))
    for person, _ in placed if "parsing" in layers else ():
        canvas.tint(person)
    for person, box in placed if "box" in layers else ():
        canvas.outline(box, track_color(person.track_id))
    for person, (_, top, _, bottom) in placed if "pose" in layers else ():
        canvas.skeleton(person, bottom - top)
    # Labels last: no line may cross a text, and no label covers another.
    for person, (left, top, _, _) in placed if "box" in layers else ():
        number = "" if person.track_id is None else f"#{person.track_id} "
        canvas.label(f"{number}{person.score:.2f}", (left, top), track_color(person.track_id))
    for person, (left, _, _, bottom) in placed if "attributes" in layers else ():
        if text := _likely(person):
            canvas.caption(text, (left, bottom))
    return canvas.image


def track_color(track_id: int | None) -> _Color:
    """Return the BGR colour of a track, the same on every call; grey without a track."""
    return _GREY if track_id is None else _hue(track_id, saturation=0.75)


def limbs(names: Sequence[str]) -> list[tuple[int, int]]:
    """Return the pairs of joints, as indices of ``names``, that a line connects."""
    index = {name: i for i, name in enumerate(names)}
    sides = [
        tuple(end if end in _SINGLE else f"{side}_{end}" for end in pair)
        for side in ("left", "right")
        for pair in _SIDE_LIMBS
    ]
    return [(index[a], index[b]) for a, b in (*_MIDDLE_LIMBS, *sides) if a in index and b in index]


class _Canvas:
    """A copy of a frame that is drawn on; sizes are chosen for 768 x 432 pixels and scale with the frame."""

    def __init__(self, frame: NDArray[np.uint8]) -> None:
        self.image: NDArray[np.uint8] = frame.copy()
        self._cv2 = load_opencv()
        self._unit: float = min(frame.shape[:2]) / 432
        self._font = self._cv2.FONT_HERSHEY_SIMPLEX
        self._pad = max(2, self._pixels(3))
        self._plates: list[_Plate] = []

    def tint(self, person: Person) -> None:
        """Lay the colour of its class over each pixel of a person, and draw where classes meet."""
        classes = person.parsing
        if classes is None or person.crop_box is None:
            return
        left, top, right, bottom = person.crop_box
        region = self.image[top:bottom, left:right]
        colors = np.array([_hue(i, saturation=0.8) for i in range(len(person.parsing_names))], np.uint8)[classes]
        shown = np.array([name != _BACKGROUND for name in person.parsing_names])[classes]
        mixed = self._cv2.addWeighted(region, 1 - _TINT, colors, _TINT, 0)
        np.copyto(region, mixed, where=shown[..., None])
        edges = np.zeros_like(shown)
        edges[1:] |= classes[1:] != classes[:-1]
        edges[:, 1:] |= classes[:, 1:] != classes[:, :-1]
        np.copyto(region, colors, where=(edges & shown)[..., None])

    def outline(self, box: Sequence[int], color: _Color) -> None:
        """Draw the rectangle of a box."""
        left, top, right, bottom = box
        self._cv2.rectangle(self.image, (left, top), (right - 1, bottom - 1), color, self._pixels(2), self._cv2.LINE_AA)

    def skeleton(self, person: Person, height: int) -> None:
        """Draw the limbs and joints that are seen, dark around them so that they stand out, thin on small people."""
        if person.keypoints is None:
            return
        cv2, names = self._cv2, person.keypoint_names
        places = np.rint(person.keypoints[:, :2]).astype(int).tolist()
        seen = person.keypoints[:, 2] >= _SEEN
        lines = [(a, b) for a, b in limbs(names) if seen[a] and seen[b]]
        part = min(1.0, height / (_TALL * self._unit))
        for rim in (True, False):
            for a, b in lines:
                color = _DARK if rim else _side_color(names[a], names[b])
                cv2.line(
                    self.image, places[a], places[b], color, self._pixels((4.5 if rim else 2.5) * part), cv2.LINE_AA
                )
        for joint in np.flatnonzero(seen).tolist():
            for radius, color in ((4.2, _DARK), (2.8, _side_color(names[joint]))):
                cv2.circle(self.image, places[joint], self._pixels(radius * part), color, cv2.FILLED, cv2.LINE_AA)

    def label(self, text: str, corner: tuple[int, int], color: _Color) -> None:
        """Write ``text`` on a plate of a track's colour above ``corner``."""
        left, top, right, bottom = plate = self._reserve(text, _LABEL, corner, above=True)
        self._cv2.rectangle(self.image, (left, top), (right, bottom), color, self._cv2.FILLED)
        dark = np.dot(color, (0.114, 0.587, 0.299)) > 110  # luma of BGR
        self._write(text, _LABEL, plate, _BLACK if dark else _WHITE)

    def caption(self, text: str, corner: tuple[int, int]) -> None:
        """Write ``text`` small on a dark, translucent plate below ``corner``."""
        left, top, right, bottom = plate = self._reserve(text, _CAPTION, corner, above=False)
        region = self.image[top:bottom, left:right]
        np.copyto(region, self._cv2.addWeighted(region, 0.3, np.full_like(region, _DARK), 0.7, 0))
        self._write(text, _CAPTION, plate, _WHITE)

    def _reserve(self, text: str, size: float, corner: tuple[int, int], *, above: bool) -> _Plate:
        """Find a plate for ``text`` at ``corner``, inside the image and clear of others where there is room."""
        (width, height), baseline = self._cv2.getTextSize(text, self._font, *self._strokes(size))
        wide, high = width + 2 * self._pad, height + baseline + 2 * self._pad
        lowest = max(0, self.image.shape[0] - high)
        left = max(0, min(corner[0], self.image.shape[1] - wide))
        top = max(0, corner[1] - high) if above else min(corner[1] + self._pixels(1), lowest)
        for other in sorted(self._plates, key=lambda plate: -plate[1] if above else plate[1]):  # as it moves past them
            if left < other[2] and left + wide > other[0] and top < other[3] and top + high > other[1]:
                top = max(0, other[1] - high) if above else min(other[3] + 1, lowest)
        self._plates.append((left, top, left + wide, top + high))
        return self._plates[-1]

    def _write(self, text: str, size: float, plate: _Plate, color: _Color) -> None:
        scale, thickness = self._strokes(size)
        baseline = self._cv2.getTextSize(text, self._font, scale, thickness)[1]
        foot = (plate[0] + self._pad, plate[3] - self._pad - baseline // 2)
        self._cv2.putText(self.image, text, foot, self._font, scale, color, thickness, self._cv2.LINE_AA)

    def _strokes(self, size: float) -> tuple[float, int]:
        """Return the scale of OpenCV's font and the thickness of its strokes."""
        return max(0.72 * size, size * self._unit), max(1, round(2.2 * size * self._unit))

    def _pixels(self, size: float) -> int:
        return max(1, round(size * self._unit))


def _likely(person: Person) -> str:
    """Name the likeliest attributes, most likely first."""
    found = sorted((-share, name) for name, share in (person.attributes or {}).items() if share >= _LIKELY)
    return ", ".join(name.replace("_", " ") for _, name in found[:_MOST_ATTRIBUTES])


def _side_color(*names: str) -> _Color:
    """Return the colour of the one side of the body that these joints are on."""
    sides = {name.partition("_")[0] for name in names} & {"left", "right"}
    if sides == {"left"}:
        return _LEFT
    return _RIGHT if sides == {"right"} else _MIDDLE


def _hue(number: int, *, saturation: float) -> _Color:
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN_RATIO % 1, saturation, 1.0)
    return round(255 * blue), round(255 * green), round(255 * red)
