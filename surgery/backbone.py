"""The frozen CLIP that everything stands on: images to tokens, texts to features."""

import copy
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import InvalidSetting
from surgery import sources
from surgery.attention import RECIPES, Recipe
from surgery.sources import CheckpointInfo
from surgery.towers import (
    ImageTokens,
    Plan,
    encode_resnet,
    encode_vit,
    resize_positions,
    wide_norm,
)

_CACHED_GRIDS = 8


def load_backbone(
    model: str | Path,
    pretrained: str | Path | None = None,
    *,
    attention: str | Recipe = "surgery",
    blocks: int = 6,
    image_size: int | tuple[int, int] | None = None,
    class_token: Literal["clip", "released"] = "clip",
    quick_gelu: bool | None = None,
    static_batch: int | None = None,
) -> "Backbone":
    """Load a CLIP for inference: evaluation mode, no gradients, on the CPU in float32.

    model: an open_clip name ("ViT-B-16", "RN50", "hf-hub:..."), the path of an open_clip JSON
        config, or "demo", the tiny CLIP of the drawn world inside this package (its weights are
        pretrained="demo"); words which that world does not have mean nothing to it.
    pretrained: an open_clip tag ("openai", ...; downloaded and cached by open_clip), or the path
        of a weights file (safetensors, torch state dict, open_clip training checkpoint, OpenAI's
        archive). None: random weights, the same in every process, with a warning.
    attention: name in `RECIPES`, or a recipe.
    blocks: how many last blocks are reformed, for the recipes that leave it open (the paper's is
        6 whatever the depth); at most all there are.
    image_size: the side, or (height, width), that images will be given in; None: the model's own.
        Any size can be encoded; this only says what `Backbone.image_size` answers.
    class_token: "clip": CLIP's own; "released": what the method's released code returns, which
        for ResNets is the reformed attention's (against the paper).
    quick_gelu: whether the network uses OpenAI's GELU; None: as the weights or the config say.
    static_batch: run the image tower through `torch.compile`, on this many images at a time, the
        last ones filled up; None: as it is. The first batch of an image size takes a minute or so,
        and of more than 8 sizes or recipes the rest is run uncompiled. The tokens are the same up
        to rounding.

    Raises ValueError for names, files or settings that do not fit, RuntimeError where a download
    failed.
    """
    if isinstance(attention, str):
        if attention not in RECIPES:
            raise InvalidSetting(f"attention={attention!r}: expected one of {', '.join(RECIPES)}")
        attention = RECIPES[attention]
    if class_token not in ("clip", "released"):
        raise InvalidSetting(f"class_token={class_token!r}: expected 'clip' or 'released'")
    if blocks < 0:
        raise InvalidSetting(f"blocks={blocks}: expected a number of blocks, 0 or more")
    if static_batch is not None and static_batch < 1:
        raise InvalidSetting(f"static_batch={static_batch}: expected a number of images, 1 or more")
    weights = None if pretrained is None else str(pretrained)
    with torch.inference_mode(False):  # whose tensors could never record a gradient
        source = sources.build(str(model), weights, quick_gelu)
        released = class_token == "released"
        backbone = Backbone(source, attention, blocks, image_size, released, static_batch)
        # Every run asks for it (prompt cache, metadata); now the weights are at hand and on the CPU.
        backbone.fingerprint()
    return backbone


class Backbone(nn.Module):
    """A CLIP whose image tower also says what each patch shows; see `load_backbone`.

    embed_dim: C, size of the joint space. patch_size: pixels a grid cell is high and wide.
    image_size: (height, width) images are expected in; others work too. mean, std: of the
    normalised images the weights were trained on, per channel, for pixels in [0, 1].
    context_length: longest text in tokens. checkpoint: where the weights came from. static_batch:
    as of `load_backbone`; may be changed.
    """

    def __init__(
        self,
        source: sources.Source,
        recipe: Recipe,
        blocks: int,
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
        self.context_length = int(self.model.context_length)
        self.mean: tuple[float, ...] = tuple(source.preprocess.get("mean") or OPENAI_DATASET_MEAN)
        self.std: tuple[float, ...] = tuple(source.preprocess.get("std") or OPENAI_DATASET_STD)

        visual = self.model.visual
        self._resnet = hasattr(visual, "attnpool")
        self.patch_size: tuple[int, int]
        side = visual.image_size
        native: tuple[int, int] = (side, side) if isinstance(side, int) else (side[0], side[1])
        if self._resnet:
            self.patch_size = (32, 32)
            self._depth = 1
        else:
            self.patch_size = (visual.patch_size[0], visual.patch_size[1])
            self._depth = len(visual.transformer.resblocks)
        self._native_grid = self._grid(native)
        if image_size is None:
            image_size = native
        elif isinstance(image_size, int):
            image_size = (image_size, image_size)
        self.image_size: tuple[int, int] = (image_size[0], image_size[1])
        self._grid(self.image_size)

        self._blocks, self._released = blocks, released
        self._positions: dict[Any, Tensor] = {}
        self._adopt(recipe)
        self._digest: tuple[Any, str] | None = None
        self.static_batch = static_batch
        self._low_precision: dict[str, Any] = {}  # shared with what `with_attention` makes
        self.requires_grad_(False)
        self.eval()

    def _adopt(self, recipe: Recipe) -> None:
        reformed = min(recipe.blocks or self._blocks, self._depth) if recipe.pairs else 0
        new_class_token = recipe.released_class_token == "new" or self._resnet
        self.recipe = recipe
        self.plan = Plan(recipe, reformed, new_class_token=self._released and new_class_token)

    def with_attention(self, attention: str) -> "Backbone":
        """The same network, not a copy of it, read by another recipe of `RECIPES`."""
        other = copy.copy(self)
        other._adopt(RECIPES[attention])
        return other

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in evaluation mode: batch norms must not learn from what is being explained."""
        return super().train(False)

    def encode_image(self, images: Tensor) -> ImageTokens:
        """Images [B, 3, H, W], normalised with `mean` and `std`, to tokens of B images.

        H and W: any multiples of the patch size (32 for ResNets), the same for all of a batch.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected [B, 3, H, W], given {list(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(
                f"images: expected normalised floats, given {images.dtype}; see `preprocess`"
            )
        grid = self._grid((images.shape[2], images.shape[3]))
        visual, positions = self._visual(images.device.type), self._positions_for(grid)
        encode = encode_resnet if self._resnet else encode_vit
        if not self.static_batch or not len(images):
            return encode(visual, images, positions, self.plan)
        parts = []
        for part in images.split(self.static_batch):
            # Also where nothing is missing: views and own tensors would be compiled apart.
            missing = self.static_batch - len(part)
            full = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)])
            tokens = _compiled(encode)(visual, full, positions, self.plan)
            parts.append((tokens.class_token[: len(part)], tokens.patch_tokens[: len(part)]))
        class_tokens, patch_tokens = zip(*parts, strict=True)
        return ImageTokens(torch.cat(class_tokens), torch.cat(patch_tokens), grid)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Token ids [T, L], L at most `context_length`, to features [T, C], not normalised.

        Attention is causal and a text is read off at its end token (the largest id), so what
        follows the longest text's end is not computed; the result is the same.
        """
        self._check_ids(token_ids)
        text = self._text
        if not self._croppable:
            # Other poolings may read any position: give them the length they were trained on.
            padding = self.context_length - token_ids.shape[1]
            pad_id = getattr(text, "pad_id", 0)
            padded = nn.functional.pad(token_ids, (0, padding), value=pad_id)
            return self.model.encode_text(padded)
        end = token_ids.argmax(dim=-1)
        states = self._text_states(token_ids[:, : int(end.max()) + 1])
        return self._project_text(states[torch.arange(len(end), device=end.device), end])

    def encode_text_tokens(self, token_ids: Tensor) -> Tensor:
        """Features of every token of texts [T, L]: [T, L, C], not normalised."""
        self._check_ids(token_ids)
        if not self._croppable:
            raise InvalidSetting(f"{self.name}: its text tower has no feature for each token")
        return self._project_text(self._text_states(token_ids))

    def encode_soft_tokens(self, weights: Tensor) -> Tensor:
        """Features at every position of soft texts, differentiable: [T, L, C], not normalised.

        weights [T, L, V]: what each position takes of each of the V embeddings of the vocabulary;
        one-hot rows are an ordinary text.
        """
        if not self._croppable:
            raise InvalidSetting(f"{self.name}: its text tower has no feature for each token")
        table = self._text.token_embedding.weight
        if weights.ndim != 3 or weights.shape[2] != len(table):
            raise ValueError(f"weights: expected [T, L, {len(table)}], given {list(weights.shape)}")
        return self._project_text(self._run_text(weights.to(table.dtype) @ table))

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] to the normalised floats that `encode_image` takes."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise InvalidSetting(
                f"images: expected uint8 [B, 3, H, W], given {images.dtype} {list(images.shape)}"
            )
        mean, std = (
            torch.tensor(values, device=images.device).view(3, 1, 1)
            for values in (self.mean, self.std)
        )
        return images.float().sub_(mean * 255).div_(std * 255)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.logit_scale.device

    @property
    def logit_scale(self) -> float:
        """What CLIP multiplies cosines with (about 100)."""
        return float(self.model.logit_scale.detach().float().exp())

    @cached_property
    def tokenizer(self) -> Any:
        """open_clip's tokenizer of this model: texts to token ids [T, context_length]."""
        return sources.tokenizer(self.name, self.config)

    def fingerprint(self) -> str:
        """Hex digest of all weights and of the model's config; follows changes made in place."""
        tensors = self.model.state_dict(keep_vars=True)
        state = [(t._version, t.dtype) for t in tensors.values()]
        if self._digest is None or self._digest[0] != state:
            with ThreadPoolExecutor() as pool:
                parts = pool.map(_digest, tensors.values())
                total = hashlib.sha256(repr(self.config).encode())
                for name, part in zip(tensors, parts, strict=True):
                    total.update(name.encode())
                    total.update(part)
            self._digest = (state, total.hexdigest())
        return self._digest[1]

    def _visual(self, device_type: str) -> Any:
        """The image tower; under autocast, with its products' weights in that precision already.

        Autocast itself would convert frozen weights again at every call. The numbers are the same.
        """
        visual = self.model.visual
        if not torch.is_autocast_enabled(device_type):
            return visual
        weights = list(visual.parameters())
        dtype = torch.get_autocast_dtype(device_type)
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return visual  # whose gradients must go to themselves
        state = [dtype, *((id(w), w.device, w.dtype, w._version) for w in weights)]
        if self._low_precision.get("state") != state:
            with torch.inference_mode(False), torch.no_grad():
                copied = copy.deepcopy(visual)
                for module in copied.modules():
                    if isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
                        for weight in module.parameters(recurse=False):
                            weight.data = weight.data.to(dtype)
            self._low_precision.update(state=state, visual=copied)
        return self._low_precision["visual"]

    @property
    def _text(self) -> Any:
        return getattr(self.model, "text", self.model)

    @cached_property
    def _croppable(self) -> bool:
        """Whether the text tower is causal and read at its end token, as CLIP's is."""
        text = self._text
        pooling = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
        causal = getattr(text, "attn_mask", None) is not None
        return pooling == "argmax" and causal and getattr(text, "cls_emb", None) is None

    def _text_states(self, token_ids: Tensor) -> Tensor:
        return self._run_text(self._text.token_embedding(token_ids))

    def _run_text(self, x: Tensor) -> Tensor:
        """Token embeddings [T, L, D] through the text tower's blocks."""
        text, length = self._text, x.shape[1]
        x = x + text.positional_embedding[:length]
        mask = text.attn_mask[:length, :length]
        return text.transformer(x, attn_mask=mask.to(x.dtype))

    def _project_text(self, states: Tensor) -> Tensor:
        """Final norm and projection, in float32."""
        text = self._text
        norm, projection = text.ln_final, text.text_projection
        with torch.autocast(states.device.type, enabled=False):
            x = wide_norm(norm, states)
            if projection is None:
                return x
            if isinstance(projection, nn.Linear):
                bias = None if projection.bias is None else projection.bias.to(x.dtype)
                return nn.functional.linear(x, projection.weight.to(x.dtype), bias)
            return x @ projection.to(x.dtype)

    def _check_ids(self, token_ids: Tensor) -> None:
        if token_ids.ndim != 2 or token_ids.is_floating_point():
            raise InvalidSetting(
                f"token_ids: expected integers [T, L], given {token_ids.dtype} "
                f"{list(token_ids.shape)}"
            )
        if not 0 < token_ids.shape[1] <= self.context_length:
            raise InvalidSetting(
                f"token_ids: expected 1 to {self.context_length} positions, "
                f"given {token_ids.shape[1]}"
            )
        if not len(token_ids):
            raise ValueError("token_ids: expected one or more texts, given none")
        if not 0 <= int(token_ids.min()) <= int(token_ids.max()) < self.model.vocab_size:
            raise InvalidSetting(
                f"token_ids: expected ids from 0 to {self.model.vocab_size - 1}, given "
                f"{int(token_ids.min())} to {int(token_ids.max())}; is the tokenizer the model's?"
            )

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Grid of an image size; ValueError where the patches do not divide it."""
        rows, columns = (side // patch for side, patch in zip(size, self.patch_size, strict=True))
        if (rows * self.patch_size[0], columns * self.patch_size[1]) != size or not rows * columns:
            raise InvalidSetting(
                f"image size {size}: expected (height, width) in multiples of the patch size "
                f"{self.patch_size}"
            )
        return rows, columns

    def _positions_for(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings of a grid; the parameter itself is never written to."""
        visual = self.model.visual
        own = visual.attnpool.positional_embedding if self._resnet else visual.positional_embedding
        if grid == self._native_grid:
            return own
        key = (grid, self.recipe.position, own.device, own.dtype, id(own), own._version)
        if key not in self._positions:
            if len(self._positions) >= _CACHED_GRIDS:
                self._positions.clear()
            # Made outside of inference mode, so that they also serve callers who want gradients.
            with torch.inference_mode(False), torch.no_grad():
                self._positions[key] = resize_positions(
                    own, self._native_grid, grid, self.recipe.position
                )
        return self._positions[key]


@cache
def _compiled(encode: Callable[..., ImageTokens]) -> Callable[..., ImageTokens]:
    compiled: Callable[..., ImageTokens] = torch.compile(encode, dynamic=False)
    return compiled


def _digest(tensor: Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous()
    head = f"{content.dtype}{list(content.shape)}".encode()
    return hashlib.sha256(head + b"\0" + content.view(-1).view(torch.uint8).numpy().data).digest()
