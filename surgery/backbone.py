"""The frozen CLIP that everything stands on: images to tokens, texts to features."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import InvalidSetting
from common.nearest import did_you_mean
from surgery import batches, sources
from surgery.attention import recipe_of
from surgery.fingerprint import Fingerprint
from surgery.precision import LowPrecision
from surgery.recipe import Recipe
from surgery.sources import CheckpointInfo
from surgery.towers import ImageTokens, Tower, Visitor, resize_positions, tower_of
from surgery.towers.text import TextTower

_CACHED_GRIDS = 8


@dataclass
class _Once:
    """Images whose tokens are kept, and the tokens by recipe and, where it needs any, texts."""

    images: Tensor | None = None
    tokens: dict[tuple[Recipe, Tensor | None], ImageTokens] = field(default_factory=dict)


def load_backbone(
    model: str | Path,
    pretrained: str | Path | None = None,
    *,
    attention: str | Mapping[str, Any] | Recipe = "surgery",
    blocks: int | str = 6,
    image_size: int | tuple[int, int] | None = None,
    class_token: Literal["clip", "released"] = "clip",
    quick_gelu: bool | None = None,
    static_batch: int | None = None,
) -> "Backbone":
    """Load a CLIP for inference: evaluation mode, no gradients, on the CPU in float32.

    Args:
        model: an open_clip name ("ViT-B-16", "RN50", "ViT-B-16-SigLIP", "hf-hub:..."; `lightning list
            models` says which can be explained), the path of an open_clip JSON config; "hf:NAME"
            (or "hf:NAME@REVISION"), a `CLIPModel` or `SiglipModel` of the Hugging Face hub, or the
            folder that one was saved to, with weights of their own (pretrained=None); or "demo",
            the tiny CLIP of the drawn world inside this package (its weights are
            pretrained="demo"); words which that world does not have mean nothing to it.
        pretrained: an open_clip tag ("openai", ...; downloaded and cached by open_clip), or the
            path of a weights file (safetensors, torch state dict, open_clip training checkpoint,
            OpenAI's archive). None: those of `model`, if it brings any, else random weights, the same
            in every process, with a warning.
        attention: name in `RECIPES`; such a ``name`` and fields that differ, as a mapping; or a recipe.
        blocks: how many last blocks are reformed, for the recipes that leave it open; at most all
            there are. Or the first of them, counted from 1: "from 7" is the paper's d = 7 read
            literally, 18 blocks of ViT-L/14, where its released code reforms 6 whatever the depth.
        image_size: the side, or (height, width), that images will be given in; None: the model's
            own. Any size can be encoded; this only says what `Backbone.image_size` answers.
        class_token: "clip": CLIP's own; "released": what the method's released code returns, which
            for ResNets is the reformed attention's (against the paper).
        quick_gelu: whether the network uses OpenAI's GELU; None: as the weights or the config say.
        static_batch: run the image tower through `torch.compile`, on this many images at a time,
            the last ones filled up; None: as it is. The first batch of an image size takes a
            minute or so, and of more than 8 sizes or recipes the rest is run uncompiled. The
            tokens are the same up to rounding.

    Returns:
        The backbone.

    Raises:
        InvalidSetting: names, files or settings do not fit.
        RuntimeError: a download failed.

    Example:
        >>> backbone = load_backbone("demo", "demo")
        >>> tokens = backbone.encode_image(torch.zeros(2, 3, 96, 144))
        >>> tokens.class_token.shape, tokens.patch_tokens.shape, tokens.grid
        (torch.Size([2, 128]), torch.Size([2, 216, 128]), (12, 18))
    """
    recipe = recipe_of(attention)
    if class_token not in ("clip", "released"):
        hint = did_you_mean(class_token, ("clip", "released"))
        raise InvalidSetting(f"class_token={class_token!r}: expected 'clip' or 'released'{hint}")
    if static_batch is not None and static_batch < 1:
        raise InvalidSetting(f"static_batch={static_batch}: expected a number of images, 1 or more")
    weights = None if pretrained is None else str(pretrained)
    with torch.inference_mode(False):  # whose tensors could never record a gradient
        source = sources.build(str(model), weights, quick_gelu)
        released = class_token == "released"
        return Backbone(source, recipe, blocks, image_size, released, static_batch)


class Backbone(nn.Module):
    """A CLIP whose image tower also says what each patch shows; see `load_backbone`.

    Attributes:
        embed_dim: C, size of the joint space.
        tower, text_tower: how images and texts are read.
        patch_size: (height, width) of a grid cell in pixels.
        image_size: (height, width) images are expected in; others work too.
        mean, std: of the normalised images the weights were trained on, per channel, for pixels
            in [0, 1].
        context_length: longest text in tokens.
        checkpoint: where the weights came from.
        recipe, plan: how the image tower is reformed, and what that means for this tower.
        batches: how many images are encoded at once.
        graph_batches: how many at once where gradients are recorded, or attention is kept.
    """

    def __init__(
        self,
        source: sources.Source,
        recipe: Recipe,
        blocks: int | str,
        image_size: int | tuple[int, int] | None,
        released: bool,
        static_batch: int | None,
    ) -> None:
        super().__init__()
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        self.model = source.model
        self.name = source.name
        self.config = source.config
        self.checkpoint: CheckpointInfo = source.checkpoint
        self.embed_dim = int(source.config["embed_dim"])
        self.mean: tuple[float, ...] = tuple(source.preprocess.get("mean") or OPENAI_DATASET_MEAN)
        self.std: tuple[float, ...] = tuple(source.preprocess.get("std") or OPENAI_DATASET_STD)

        self.tower: Tower = tower_of(self.model.visual)
        self.text_tower = TextTower(self.model, self.name)
        self.patch_size = self.tower.patch_size
        self.context_length = self.text_tower.context_length
        if image_size is None:
            image_size = self.tower.native
        elif isinstance(image_size, int):
            image_size = (image_size, image_size)
        self.image_size: tuple[int, int] = (image_size[0], image_size[1])
        self.tower.grid(self.image_size)

        self._blocks, self._released = blocks, released
        self._adopt(recipe)
        # What follows is shared with the backbones that `with_attention` makes.
        self.batches = batches.Batches(static_batch, fixed=static_batch is not None)
        self.graph_batches = batches.Batches()
        self._positions: dict[Any, Tensor] = {}
        self._once = _Once()
        self._colours: dict[torch.device, Tensor] = {}
        self._fingerprint, self._low_precision = Fingerprint(), LowPrecision()
        self.requires_grad_(False)
        self.eval()

    def _adopt(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.plan = self.tower.plan(recipe, self._blocks, self._released)

    def with_attention(self, attention: str | Mapping[str, Any] | Recipe) -> "Backbone":
        """The same network, not a copy of it, read by another recipe, see `load_backbone`."""
        other = copy.copy(self)
        other._adopt(recipe_of(attention))
        return other

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in evaluation mode: batch norms must not learn from what is being explained."""
        return super().train(False)

    def encode_image(self, images: Tensor, texts: Tensor | None = None) -> ImageTokens:
        """Tokens of images; in halves, where they do not fit the memory at once.

        Args:
            images: [B, 3, H, W], normalised with `mean` and `std`; H and W any multiples of the
                patch size (32 for ResNets).
            texts: features [T, C] that the tokens will be compared with, for recipes that need them;
                others don't read them.

        Returns:
            The tokens of B images, not normalised.

        Raises:
            InvalidSetting: the patches do not divide the images, or the recipe needs texts.
        """
        if not self.plan.recipe.needs_texts:
            texts = None
        elif texts is None or not len(texts):
            raise InvalidSetting(
                "this recipe reads images by the texts that they are compared with: "
                "encode_image(images, texts=[T, C])"
            )
        key = (self.recipe, texts)
        if images is self._once.images and key in self._once.tokens:
            return self._once.tokens[key]
        grid = self._check(images)

        def encode(part: Tensor) -> tuple[Tensor, Tensor]:
            # Those with nothing in them have another shape than what was compiled for.
            run = type(self.tower).encode
            run = batches.compiled(run) if self.batches.fixed and len(part) else run
            tokens = run(self._tower(part), part, self._positions_for(grid), self.plan, texts)
            return tokens.class_token, tokens.patch_tokens

        class_token, patch_tokens = self.batches.run(encode, images)
        tokens = ImageTokens(class_token, patch_tokens, grid)
        if images is self._once.images:
            self._once.tokens[key] = tokens
        return tokens

    @contextmanager
    def encoding_once(self, images: Tensor) -> Iterator[None]:
        """Meanwhile, encode these images once a recipe, however often they are asked for."""
        self._once.images = images
        try:
            yield
        finally:
            self._once.images = None
            self._once.tokens.clear()

    def walk(self, images: Tensor, visitor: Visitor, *, class_only: bool = False) -> Tensor:
        """Images through the unreformed tower, with a visitor at every block.

        Args:
            images: as of `encode_image`; all at once.
            visitor: see `Visitor`.
            class_only: the last block is only wanted for the class token.

        Returns:
            Tokens [B, 1 + h*w, D] ([B, 1, D] with `class_only`), before `tower.project`.
        """
        positions = self._positions_for(self._check(images))
        return self._tower(images).run(images, positions, visitor, class_only=class_only)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Token ids [T, L], L at most `context_length`, to features [T, C], not normalised."""
        return self.text_tower.encode(token_ids)

    def encode_text_tokens(self, token_ids: Tensor) -> Tensor:
        """Features of every token of texts [T, L]: [T, L, C], not normalised."""
        return self.text_tower.encode_tokens(token_ids)

    def encode_embeddings(self, embeddings: Tensor) -> Tensor:
        """Features at every position of embedded texts, differentiable: [T, L, C], not normalised.

        Args:
            embeddings: [T, L, D], of tokens (rows of ``text_tower.table``), or what lies between.
        """
        return self.text_tower.encode_embedded(embeddings)

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] to the normalised floats that `encode_image` takes.

        They are float32, whatever torch's default is: in halves, mean and deviation alone would be
        off by a hundredth.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise InvalidSetting(
                f"images: expected uint8 [B, 3, H, W], given {images.dtype} {list(images.shape)}"
            )
        if images.device not in self._colours:
            with torch.inference_mode(False):
                self._colours[images.device] = torch.stack(
                    [
                        torch.tensor(values, dtype=torch.float32, device=images.device) * 255
                        for values in (self.mean, self.std)
                    ]
                )[:, :, None, None]
        mean, std = self._colours[images.device]
        return images.float().sub_(mean).div_(std)

    @property
    def title(self) -> str:
        """Its name for people, and that of its weights."""
        if Path(self.name).parent == sources.DEMO_FOLDER:
            return "the demo CLIP"
        weights = self.checkpoint.name
        weights = Path(weights).name if self.checkpoint.path == weights else weights
        return f"{self.name.removesuffix('.json').rpartition('/')[2]} ({weights})"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.logit_scale.device

    @property
    def logit_scale(self) -> float:
        """What CLIP multiplies cosines with (about 100)."""
        return float(self.model.logit_scale.detach().float().exp())

    @property
    def logit_bias(self) -> float | None:
        """What SigLIP adds to that before its sigmoid (about -10); None for models without one."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else float(bias.detach())

    @cached_property
    def tokenizer(self) -> Any:
        """open_clip's tokenizer of this model: texts to token ids [T, context_length]."""
        return sources.tokenizer(self.name, self.config)

    def fingerprint(self) -> str:
        """Hex digest of all weights and of the model's config; follows changes made in place."""
        return self._fingerprint.of(self.model, self.config)

    def _check(self, images: Tensor) -> tuple[int, int]:
        """The grid of images that can be encoded."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected [B, 3, H, W], given {list(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(
                f"images: expected normalised floats, given {images.dtype}; see `preprocess`"
            )
        return self.tower.grid((images.shape[2], images.shape[3]))

    def _tower(self, images: Tensor) -> Tower:
        """The tower in the precision of the moment."""
        visual = self._low_precision.of(self.tower.visual, images.device.type)
        return self.tower if visual is self.tower.visual else type(self.tower)(visual)

    def _positions_for(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings of a grid; the parameter itself is never written to."""
        own, native = self.tower.positions, self.tower.grid(self.tower.native)
        if grid == native and self.recipe.position != "none":
            return own
        key = (grid, self.recipe.position, own.device, own.dtype, own.data_ptr(), own._version)
        if key not in self._positions:
            if len(self._positions) >= _CACHED_GRIDS:
                self._positions.clear()
            # Made outside of inference mode, so that they also serve callers who want gradients.
            with torch.inference_mode(False), torch.no_grad():
                self._positions[key] = resize_positions(own, native, grid, self.recipe.position)
        return self._positions[key]
