"""What a method of distillation is: views in, targets from frozen teachers, losses out."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from dpal_edge.models.students import Student
from dpal_edge.models.teacher import Teachers

if TYPE_CHECKING:
    from dpal_edge.train.config import TrainConfig

Values = dict[str, Tensor]  # by name: scalars, or vectors that are logged as name/0, name/1, ...


@dataclass(frozen=True)
class Views:
    """Views of B people on the training device, images normalised with the ImageNet mean and std.

    What the method does not name in ``Method.views`` is None.
    """

    base: Tensor  # (B, 3, H, W): most of a person, augmented
    local: Tensor | None = None  # (L * B, 3, h, w): all first crops, then all second ones
    crowd: Tensor | None = None  # (B, 3, Hc, Wc): several people
    clean: Tensor | None = None  # (B, 3, H, W): ``base`` before colours were changed and blur was added
    masked: Tensor | None = None  # (B, N) bool: patches of ``base`` to hide; only even images of a batch have any
    keys: Tensor | None = (
        None  # (B,) int64 on the host: number of the (image, views), the same whenever they come again
    )


class Method(nn.Module):
    """Student backbone, frozen teachers and whatever is trained beside the backbone and never exported.

    A new method is one new file in ``methods/`` with a subclass named ``METHOD`` there. Parameters that its loss does
    not reach must not require gradients: data-parallel training would wait for theirs.
    """

    options: ClassVar[type[Any]]  # frozen dataclass of the settings of this method alone, no name of TrainConfig in it
    views: ClassVar[tuple[str, ...]] = ("base",)  # fields of Views that it looks at

    def __init__(self, backbone: Student, teachers: Teachers) -> None:
        super().__init__()
        self.backbone = backbone
        self.teachers = teachers

    @classmethod
    def build(cls, config: "TrainConfig", teachers: Teachers) -> "Method":
        """Build the method for ``config``, initialised from its seed; its own settings are ``config.options``.

        Raises:
            ConfigError: a student or teacher that the method cannot take.
        """
        raise NotImplementedError

    def targets(self, views: Views) -> Values:
        """Return what the teachers say of the views, without gradients: a function of each image alone.

        Every tensor has the image as its first axis, so that targets can be kept and looked up by image.
        """
        raise NotImplementedError

    def forward(self, views: Views, targets: Values, progress: float) -> Values:
        """Return ``loss``, the unweighted terms it is made of, and what else is worth logging, all on the device.

        Args:
            views: the views.
            targets: what ``targets`` gave for them.
            progress: share of the run that is done, 0..1.
        """
        raise NotImplementedError

    def student_state(self) -> dict[str, Tensor]:
        """Return the state that training changes: all but the teachers."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("teachers.")}

    def spared_from_decay(self) -> set[str]:
        """Names of embeddings and tokens, which docs/method.md 8 suggests to spare from weight decay."""
        return {"backbone.pos_embed", "backbone.cls_token"}
