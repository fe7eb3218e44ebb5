"""Networks that can teach, each with the block whose tokens are aligned, behind one contract."""

from typing import Any

import torch
from torch import Tensor, nn

from dpal_edge.errors import ConfigError
from dpal_edge.models.swin import STEM, SwinTransformer
from dpal_edge.models.teacher_spec import Target
from dpal_edge.models.vit import VisionTransformer


class Encoder(nn.Module):
    """A network and one block of it.

    ``forward`` maps images (B, 3, H, W), H and W multiples of ``step``, normalised as the network wants them, to tokens
    (B, 1 + N, ``width``) after block ``layer`` and the final norm: a global token, then the patches in row order,
    N = ceil(H / ``patch_size``) * ceil(W / ``patch_size``).
    """

    patch_size: int  # pixels of a side of a token
    step: int  # pixels
    width: int
    depth: int  # blocks
    layer: int  # 1 to depth
    target: Target  # what the global token is
    heads: int | None = None  # of block ``layer``; None where its attention is not that of a plain ViT
    all_heads: str = ""  # of this project's ViT; as in "6+12" where the last block has others than the rest
    resize: str = ""  # how this project's ViT resizes its positions
    semantic_weight: float | None = None  # SOLIDER's

    def attend(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``forward``'s tokens and the qkv output (B, T, 3 * width) of block ``layer``.

        T counts the class token where there is one, and the patches.

        Raises:
            ConfigError: ``heads`` is None.
        """
        raise ConfigError(
            f"{type(self.network).__name__} has no plain attention (queries, keys and values of one linear layer, over "
            f"all tokens); TinyMIM and --recipe attn need a ViT with it, without rotary positions"
        )

    @property
    def network(self) -> nn.Module:
        """The network itself."""
        return next(self.children())


class VitEncoder(Encoder):
    """This project's ViT; ``layer`` None is the last block."""

    def __init__(self, vit: VisionTransformer, layer: int | None = None) -> None:
        super().__init__()
        self.vit = vit
        config = vit.config
        self.patch_size = self.step = config.patch_size
        self.width, self.depth = config.width, config.depth
        self.layer = layer or config.depth
        self.target = "cls" if config.class_token else "mean"
        self.heads = config.last_heads if self.layer == config.depth else config.heads
        self.all_heads = "+".join(map(str, dict.fromkeys((config.heads, config.last_heads))))
        self.resize = config.pos_interp

    def forward(self, images: Tensor) -> Tensor:
        """Return the tokens."""
        tokens: Tensor = self.vit(images, self.layer)
        return tokens

    def attend(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens and the qkv output."""
        return self.vit.attend(images, self.layer)


class SwinEncoder(Encoder):
    """This project's Swin, with a semantic weight of SOLIDER or None; ``layer`` None is the last block."""

    target: Target = "pooled"
    step = STEM

    def __init__(self, swin: SwinTransformer, layer: int | None = None, semantic_weight: float | None = None) -> None:
        super().__init__()
        self.swin = swin
        self.semantic_weight = semantic_weight
        self.patch_size, self.width, self.depth = swin.config.patch_size, swin.config.width, swin.config.depth
        self.layer = layer or self.depth

    def forward(self, images: Tensor) -> Tensor:
        """Return the tokens."""
        tokens: Tensor = self.swin(images, self.layer, self.semantic_weight)
        return tokens


class TimmEncoder(Encoder):
    """A ViT of timm's that has ``blocks`` and takes images of any size; ``layer`` None is the last block.

    Where the model pools before its final norm, that norm (``fc_norm``) is applied to every token here.
    """

    def __init__(self, model: Any, layer: int | None = None) -> None:
        super().__init__()
        from timm.models.vision_transformer import Attention  # the plain one: others have biases or turn by position

        self.model = model
        self.patch_size = self.step = model.patch_embed.patch_size[0]
        self.width, self.depth = model.embed_dim, len(model.blocks)
        self.layer = layer or self.depth
        self.target = "mean" if model.cls_token is None else "cls"
        attention = model.blocks[self.layer - 1].attn
        if type(attention) is Attention and isinstance(attention.q_norm, nn.Identity):
            self.heads = attention.num_heads

    @property
    def norm(self) -> nn.Module:
        """The final norm; the identity if there is none."""
        norm: nn.Module = self.model.fc_norm if isinstance(self.model.norm, nn.Identity) else self.model.norm
        return norm

    def forward(self, images: Tensor) -> Tensor:
        """Return the tokens, without registers."""
        [taken] = self.model.forward_intermediates(
            images, indices=[self.layer - 1], norm=False, stop_early=True, output_fmt="NLC", return_prefix_tokens=True,
            intermediates_only=True,
        )  # fmt: skip
        patches, prefix = taken if isinstance(taken, tuple) else (taken, None)  # no tuple without prefix tokens
        patches = self.norm(patches)
        # The class token comes before registers; without one, registers may still be there.
        mean = prefix is None or self.target == "mean"
        first = patches.mean(1, keepdim=True) if mean else self.norm(prefix[:, :1])
        return torch.cat([first, patches], dim=1)

    def attend(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens and the qkv output, without registers."""
        if self.heads is None:
            return super().attend(images)
        caught: list[Tensor] = []
        layer = self.model.blocks[self.layer - 1].attn.qkv
        handle = layer.register_forward_hook(lambda module, inputs, output: caught.append(output))
        try:
            tokens = self(images)
        finally:
            handle.remove()
        [qkv] = caught
        registers = slice(int(self.target == "cls"), self.model.num_prefix_tokens)
        return tokens, torch.cat([qkv[:, : registers.start], qkv[:, registers.stop :]], dim=1)
