"""The demo CLIP: open_clip's parameters under open_clip's names, in a forward that is quick on a CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import InvalidSetting
from common.files import write_atomically
from surgery.checkpoints import IDS, ROWS

IMAGE, PATCH = 96, 8
GRID = IMAGE // PATCH
WIDTH, HEAD, EMBED = 128, 64, 128
VISION_LAYERS, TEXT_LAYERS = 12, 3
CONTEXT, VOCABULARY = 77, 49408
WORDS = 32
"""Tokens of the longest caption seen in training; later positions stay as they were drawn."""

CONFIG: dict[str, Any] = {
    "embed_dim": EMBED,
    "vision_cfg": {
        "image_size": IMAGE,
        "layers": VISION_LAYERS,
        "width": WIDTH,
        "head_width": HEAD,
        "patch_size": PATCH,
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": WIDTH,
        "heads": WIDTH // HEAD,
        "layers": TEXT_LAYERS,
    },
}


class Attention(nn.Module):
    """Self-attention by plain products: on CPUs the backward of the fused kernel is slow."""

    def __init__(self) -> None:
        super().__init__()
        query = torch.empty(WIDTH, WIDTH)
        key, value = torch.empty_like(query), torch.empty_like(query)
        for weight in (query, key, value):
            nn.init.xavier_uniform_(weight)
        # Keys near queries: at first a token looks at those which resemble it.
        self.in_proj_weight = nn.Parameter(torch.cat([query, 0.8 * query + 0.6 * key, value]))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * WIDTH))
        self.out_proj = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, N, C], mask [N, N] added to the logits; returns [B, N, C]."""
        batch, length, _ = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(batch, length, 3, WIDTH // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) * HEAD**-0.5
        if mask is not None:
            logits = logits + mask
        out = logits.softmax(-1).to(v.dtype) @ v
        return self.out_proj(out.transpose(1, 2).reshape(batch, length, WIDTH))


class MLP(nn.Module):
    """The two-layer perceptron of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc = nn.Linear(WIDTH, 4 * WIDTH)
        self.c_proj = nn.Linear(4 * WIDTH, WIDTH)
        for layer in (self.c_fc, self.c_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C]; returns [B, N, C]."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, N, C]; returns [B, N, C]."""
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, N, C]; returns [B, N, C]."""
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Conv(nn.Module):
    """Holds the patch embedding under its stock name and shape."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Vision(nn.Module):
    """The image tower, fed with patches instead of images."""

    mean: Tensor
    std: Tensor

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(WIDTH) * WIDTH**-0.5)
        self.positional_embedding = nn.Parameter(positions())
        self.proj = nn.Parameter(torch.randn(WIDTH, EMBED) * WIDTH**-0.5)
        self.conv1 = Conv(basis)
        self.ln_pre = nn.LayerNorm(WIDTH)
        self.transformer = Transformer(VISION_LAYERS)
        self.ln_post = nn.LayerNorm(WIDTH)
        for name, values in (("mean", OPENAI_DATASET_MEAN), ("std", OPENAI_DATASET_STD)):
            pixels = torch.tensor(values).repeat_interleave(PATCH * PATCH) * 255
            self.register_buffer(name, pixels, persistent=False)

    def forward(self, patches: Tensor, kept: Tensor) -> Tensor:
        """patches uint8 [B, K, 3 P P], their places kept int64 [B, K]; returns [B, C]."""
        x = (patches.float() - self.mean) / self.std
        x = F.linear(x, self.conv1.weight.flatten(1)) + self.positional_embedding[1:][kept]
        first = self.class_embedding + self.positional_embedding[0]
        x = torch.cat([first.expand(len(x), 1, -1), x], 1)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class DemoCLIP(nn.Module):
    """Both towers; the token table holds the rows that captions use, row 0 every other word."""

    causal: Tensor

    def __init__(self, basis: Tensor, rows: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.01)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, EMBED) * WIDTH**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(14.3)))
        self.visual = Vision(basis)
        self.transformer = Transformer(TEXT_LAYERS)
        self.token_embedding = nn.Embedding(rows, WIDTH, padding_idx=0)
        self.ln_final = nn.LayerNorm(WIDTH)
        with torch.no_grad():
            self.token_embedding.weight[1:].normal_(std=0.02)
        mask = torch.full((WORDS, WORDS), -torch.inf).triu(1)
        self.register_buffer("causal", mask, persistent=False)

    def encode_text(self, tokens: Tensor, end: Tensor) -> Tensor:
        """tokens int64 [B, L], the place of each end token int64 [B]; returns [B, C]."""
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.transformer(x, self.causal[:length, :length])
        return self.ln_final(x[torch.arange(len(x)), end]) @ self.text_projection

    def forward(
        self, patches: Tensor, kept: Tensor, tokens: Tensor, end: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Unit features of images and of texts, float32 [B, C] each."""
        image = F.normalize(self.visual(patches, kept).float(), dim=-1)
        return image, F.normalize(self.encode_text(tokens, end).float(), dim=-1)


def positions() -> Tensor:
    """0.4 times the 2-D sine-cosine positions of the grid after a zero, [1 + h w, C]."""
    rates = 10000 ** -(torch.arange(WIDTH // 4) / (WIDTH // 4))
    angles = torch.arange(GRID)[:, None] * rates * 2
    axis = torch.cat([angles.sin(), angles.cos()], 1)  # [GRID, C / 2]
    down, across = axis[:, None].expand(-1, GRID, -1), axis[None].expand(GRID, -1, -1)
    grid = torch.cat([down, across], 2).flatten(0, 1)
    return torch.cat([torch.zeros(1, WIDTH), 0.4 * grid])


def whitened_cosines(patches: Tensor) -> Tensor:
    """The cosine patterns that vary most over patches [N, 3 P P], whitened, [C, 3, P, P].

    The patterns are products of the 8 x 8 cosine transform and of three opponent colours, scaled
    towards unit deviation; those which hardly vary are left small, for they are mostly noise.
    """
    at = torch.arange(PATCH)
    waves = torch.cos(math.pi / PATCH * (at + 0.5) * at[:, None])
    waves = F.normalize(waves, dim=1)
    opponent = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    patterns = torch.einsum("ac,iy,jx->aijcyx", F.normalize(opponent, dim=1), waves, waves)
    patterns = patterns.reshape(-1, 3 * PATCH * PATCH)
    mean = torch.tensor(OPENAI_DATASET_MEAN).repeat_interleave(PATCH * PATCH) * 255
    std = torch.tensor(OPENAI_DATASET_STD).repeat_interleave(PATCH * PATCH) * 255
    spread = ((patches.float() - mean) / std @ patterns.T).std(0)
    chosen = spread.argsort(descending=True, stable=True)[:WIDTH]
    return (patterns[chosen] / (spread[chosen, None] + 0.25)).view(WIDTH, 3, PATCH, PATCH)


def patchify(image: np.ndarray) -> Tensor:
    """An image uint8 [H, W, 3] as patches uint8 [h w, 3 P P]."""
    pixels = torch.from_numpy(image).view(GRID, PATCH, GRID, PATCH, 3)
    return pixels.permute(0, 2, 4, 1, 3).reshape(GRID * GRID, 3 * PATCH * PATCH)


def save(model: DemoCLIP, ids: list[int], folder: Path) -> None:
    """Write the stock model: its config, and its weights in float16.

    Of the table of token embeddings the file holds the rows of the known tokens ``ids`` only, as
    `surgery.checkpoints` reads them: the others were never learned.
    """
    state = {key: value.detach().half().contiguous() for key, value in model.state_dict().items()}
    state[ROWS] = state.pop("token_embedding.weight")[1:].contiguous()
    state[IDS] = torch.as_tensor(ids)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "model.safetensors", safetensors_bytes(state, {"format": "pt"}))
    write_atomically(folder / "config.json", json.dumps(CONFIG, indent=2) + "\n")


def load(model: DemoCLIP, ids: list[int], folder: Path) -> None:
    """Read back what `save` wrote.

    Raises:
        InvalidSetting: the model was trained on other tokens than ``ids``.
    """
    state = load_file(folder / "model.safetensors")
    if not torch.equal(state.pop(IDS), torch.as_tensor(ids)):
        raise InvalidSetting(
            f"{folder}: a model of other words than those of the world as it is now"
        )
    state = {key: value.float() for key, value in state.items()}
    state["token_embedding.weight"] = torch.cat([torch.zeros(1, WIDTH), state.pop(ROWS)])
    model.load_state_dict(state)
