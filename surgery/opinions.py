"""What CLIP itself would say of an image: texts found by gradient ascent on soft tokens.

The idea is that of the text opinions in zer0int/CLIP_Surgery, which go back to a script by
@advadnoun: start from random tokens, and follow the gradient of the cosine with the image. Four
things differ. The mean cosine with all views of an image is the dot product with the mean of their
unit features, which is all that is kept of them; they are encoded once, unless `fresh_features`
draws them anew for every step. Every sequence is optimised by itself, with random numbers of its
own, so that neither the number of sequences that share the memory nor the other images of a batch
reach the result. The text tower gets the embeddings of the tokens that were chosen, and the gradient
of the softmax behind the choice is written out: a third of the passes over the vocabulary. And tokens
that the weights have never learned, as the demo's have not learned most, are not chosen from.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from common import signals
from common.errors import InvalidSetting
from surgery.backbone import Backbone

_TEMPERATURE = 1000.0  # of the softmax behind the hard choice: all tokens get their gradient
_MOMENTUM = 0.9

Optimiser = Literal["momentum", "adam"]
LEARNING_RATES: dict[Optimiser, float] = {"momentum": 1.0, "adam": 5.0}
"""What each optimiser is used with: ours, and the fork's."""

_DEGREES, _SHIFT, _PROBABILITY = 10.0, 0.1, 0.8  # of the views


@dataclass(frozen=True)
class Ascent:
    """What an ascent passed through.

    Attributes:
        ids: int64 [steps, S, L], the L tokens that each of S sequences stood for at every step,
            without start, prompt and end.
        scores: float32 [steps, S], the cosine of the whole text, prompt included, with the views, in
            [-1, 1]; where they are drawn anew in every step, the mean over the views of all steps.
    """

    ids: Tensor
    scores: Tensor


def seed_from(*parts: object) -> int:
    """A seed below 2^63 that depends on the parts alone, on every machine alike.

    Example:
        >>> seed_from(0, "cat.jpg") == seed_from(0, "cat.jpg") != seed_from(1, "cat.jpg")
        True
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def views(image: Tensor, count: int, seed: int) -> Tensor:
    """An image and variants of it.

    A variant is turned by up to 10 degrees and moved by up to a tenth of the side, or, one time in
    five, the image as it is; the edge is continued outwards.

    Args:
        image: uint8 [3, H, W].
        count: images in all, 1 or more.
        seed: settles the variants.

    Returns:
        uint8 [count, 3, H, W], the image itself first.

    Raises:
        InvalidSetting: another type, shape or count.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or count < 1:
        raise InvalidSetting(
            f"expected an image uint8 [3, H, W] and a count of 1 or more, given {image.dtype} "
            f"{list(image.shape)} and {count}"
        )
    generator = torch.Generator().manual_seed(seed)
    angle, x, y = (2 * torch.rand(count, 3, generator=generator, dtype=torch.float32) - 1).T
    moved = torch.rand(count, generator=generator, dtype=torch.float32) < _PROBABILITY
    moved[0] = False
    angle = angle * moved * math.radians(_DEGREES)
    x, y = (2 * _SHIFT * shift * moved for shift in (x, y))
    # Turned in pixels: the coordinates of a grid are in units of half a side.
    ratio = image.shape[1] / image.shape[2]
    rows = (angle.cos(), -angle.sin() * ratio, x, angle.sin() / ratio, angle.cos(), y)
    matrix = torch.stack(rows, dim=1).view(count, 2, 3).to(image.device)
    batch = image[None].float().expand(count, -1, -1, -1)
    grid = F.affine_grid(matrix, list(batch.shape), align_corners=False)
    turned = F.grid_sample(batch, grid, padding_mode="border", align_corners=False)
    return turned.round().to(torch.uint8)


def mean_feature(backbone: Backbone, images: Tensor, micro_batch: int) -> Tensor:
    """Mean of the unit class tokens of images.

    Args:
        backbone: that encodes them.
        images: uint8 [B, 3, H, W].
        micro_batch: images that are encoded at a time.

    Returns:
        [C], in float32.
    """
    total = torch.zeros(backbone.embed_dim, dtype=torch.float32, device=backbone.device)
    for part in images.split(micro_batch):
        tokens = backbone.encode_image(backbone.preprocess(part.to(backbone.device)))
        total += F.normalize(tokens.class_token.float(), dim=-1).sum(dim=0)
    return total / len(images)


def fresh_features(
    backbone: Backbone, image: Tensor, count: int, steps: int, seed: int, micro_batch: int
) -> Tensor:
    """`mean_feature` of other `views` in every step.

    Args:
        backbone: that encodes them.
        image: uint8 [3, H, W].
        count: views a step, the image itself among them.
        steps: for how many.
        seed: with the number of a step, it settles its views.
        micro_batch: views that are encoded at a time.

    Returns:
        [steps, C], in float32.
    """
    features = []
    for step in range(steps):
        signals.check()  # all of them take longer than who asks to stop waits
        drawn = views(image, count, seed_from(seed, "views", step))
        features.append(mean_feature(backbone, drawn, micro_batch))
    return torch.stack(features)


def ascend(backbone: Backbone, tokenizer: Any, target: Tensor, *, seed: int, **how: Any) -> Ascent:
    """`ascend_all` for one target [C] or [steps, C] and its seed; ``how`` are the other options."""
    return ascend_all(backbone, tokenizer, [target], seeds=[seed], **how)[0]


def ascend_all(
    backbone: Backbone,
    tokenizer: Any,
    targets: Sequence[Tensor],
    *,
    seeds: Sequence[int],
    sequences: int,
    length: int,
    steps: int,
    micro_batch: int,
    prompt: str = "",
    optimiser: Optimiser = "momentum",
    lr: float | None = None,
) -> list[Ascent]:
    """Texts whose features come near to targets, by gradient ascent on their tokens.

    Each of `length` positions of a sequence has one logit a token that the weights know, at first
    standard normal. A step adds Gumbel noise, takes the best token (straight-through: the gradient
    is that of the softmax behind the choice), and moves the logits uphill by the gradient of
    text . target: ``momentum`` along its running mean, scaled so that a step changes the foremost
    logit of a position by `lr`; ``adam`` each logit by up to about `lr`. Works under inference mode and
    autocast, in full precision.

    Args:
        backbone: whose text tower is followed.
        tokenizer: its own.
        targets: [C], or [steps, C], another one in every step; of each image.
        seeds: of each target; with the number of a sequence, it settles its random numbers.
        sequences: S, how many texts for each target.
        length: tokens of a text that are sought, without start, prompt and end.
        steps: of the ascent.
        prompt: words that stand before the tokens of every text and stay as they are.
        optimiser: see above.
        lr: see above; by default that of `LEARNING_RATES`.
        micro_batch: sequences in memory at a time, whatever their targets, each with some
            10 x length x V numbers; the others follow.

    Returns:
        All steps of all texts, for each target.

    Raises:
        InvalidSetting: more tokens than the model reads, or no such optimiser.
    """
    if optimiser not in get_args(Optimiser):
        known = ", ".join(get_args(Optimiser))
        raise InvalidSetting(f"optimiser: expected one of {known}, given {optimiser!r}")
    frame = _Frame.of(tokenizer, prompt)
    most = backbone.context_length - 1 - len(frame.before)
    if not 1 <= length <= most:
        after = f" after the prompt {prompt!r}" if prompt else ""
        raise InvalidSetting(f"length: expected 1 to {max(most, 0)} tokens{after}, given {length}")
    rate = LEARNING_RATES[optimiser] if lr is None else lr
    own = [seed_from(seed, number) for seed in seeds for number in range(sequences)]
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(backbone.device.type, enabled=False),
    ):
        goals = torch.stack([one.detach().float().expand(steps, -1) for one in targets], dim=1)
        which = torch.arange(len(targets), device=goals.device).repeat_interleave(sequences)
        parts = [
            _ascend(backbone, frame, goals[:, here], own_seeds, length, optimiser, rate)
            for here, own_seeds in zip(
                which.split(micro_batch),
                (own[i : i + micro_batch] for i in range(0, len(own), micro_batch)),
                strict=True,
            )
        ]
    ids, scores = (torch.cat([part[i] for part in parts], dim=1) for i in range(2))
    return [
        Ascent(*both)
        for both in zip(ids.split(sequences, dim=1), scores.split(sequences, dim=1), strict=True)
    ]


@dataclass(frozen=True)
class _Frame:
    """Ids of what stands around the tokens of a text: start and prompt, and the end."""

    before: tuple[int, ...]
    end: int

    @classmethod
    def of(cls, tokenizer: Any, prompt: str) -> _Frame:
        ids = tokenizer([prompt])[0].tolist()
        end = ids.index(max(ids))
        return cls(tuple(ids[:end]), ids[end])


def _ascend(
    backbone: Backbone,
    frame: _Frame,
    goals: Tensor,
    seeds: Sequence[int],
    length: int,
    optimiser: Optimiser,
    lr: float,
) -> tuple[Tensor, Tensor]:
    """ids [steps, m, length] and scores [steps, m] of m sequences, by goals [steps, m, C] and seeds."""
    device, text = goals.device, backbone.text_tower
    taught = text.taught()
    known = torch.arange(len(text.table)) if taught is None else taught.nonzero().flatten()
    known = known.to(device)
    table = text.table.detach()[known].float()
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    # Half precision, if it is this run's default, would lose the small steps.
    blank = torch.empty(length, len(known), dtype=torch.float32, device=device)
    logits = torch.stack([torch.empty_like(blank).normal_(generator=g) for g in generators])
    special = torch.tensor([frame.before[0], frame.end], device=device)
    logits[..., torch.isin(known, special)] = -math.inf
    before, end = (
        text.table.detach()[index].float().expand(len(logits), -1, -1)
        for index in (list(frame.before), [frame.end])
    )
    move = (_momentum if optimiser == "momentum" else _adam)(logits, lr)
    judges = goals.mean(dim=0)
    ids, scores = [], []
    for goal in goals:
        signals.check()  # a batch climbs for minutes, longer than who asks to stop waits
        noise = [
            torch.empty_like(blank).exponential_(generator=g).log_().neg_() for g in generators
        ]
        noisy = torch.stack(noise).add_(logits)
        chosen = noisy.argmax(dim=-1)
        tokens = table[chosen].requires_grad_()
        features = backbone.encode_embeddings(torch.cat([before, tokens, end], dim=1))
        reached = F.normalize(features[:, -1], dim=-1)
        (by_token,) = torch.autograd.grad((reached * goal).sum(), tokens)
        move(_through_softmax(noisy, by_token @ table.T))
        ids.append(known[chosen])
        scores.append((reached.detach() * judges).sum(dim=-1))
    return torch.stack(ids), torch.stack(scores)


def _momentum(logits: Tensor, lr: float) -> Callable[[Tensor], None]:
    """Moves logits [m,L,V] by a gradient: along the running mean, the foremost of V by `lr`."""
    mean = torch.zeros_like(logits)

    def move(gradient: Tensor) -> None:
        mean.lerp_(gradient, 1 - _MOMENTUM)
        foremost = mean.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        logits.addcdiv_(mean, foremost, value=lr)

    return move


def _adam(logits: Tensor, lr: float) -> Callable[[Tensor], None]:
    """The same by Adam, which takes no notice of a gradient's size but for its epsilon."""
    adam = torch.optim.Adam([logits], lr=lr, maximize=True)
    # Through the softmax a gradient is so small that epsilon would be most of what it is divided by.
    scale = _TEMPERATURE * logits.shape[-1]

    def move(gradient: Tensor) -> None:
        logits.grad = gradient.mul_(scale)
        adam.step()

    return move


def _through_softmax(noisy: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of logits [m,L,V] from that of the softmax of them over the temperature."""
    soft = (noisy / _TEMPERATURE).softmax(dim=-1)
    gradient = gradient - (soft * gradient).sum(dim=-1, keepdim=True)
    return gradient.mul_(soft).div_(_TEMPERATURE)


def word_frequencies(tokenizer: Any, ids: Tensor) -> dict[str, int]:
    """How often each word stands in sequences of tokens.

    A word is what white space and punctuation leave of a decoded sequence; one that two tokens
    make up ("trou", "ser") counts as one.

    Args:
        tokenizer: open_clip's.
        ids: int64 [..., L].

    Returns:
        Word -> count, the most frequent first.
    """
    counts: Counter[str] = Counter()
    texts: Counter[tuple[int, ...]] = Counter(map(tuple, ids.flatten(0, -2).tolist()))
    for sequence, times in texts.items():
        for word in _words(tokenizer, sequence):
            counts[word] += times
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _words(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    known = [i for i in ids if i in tokenizer.decoder] if hasattr(tokenizer, "decoder") else ids
    text = tokenizer.decode(list(known))
    return "".join(c if c.isalnum() else " " for c in text).split()
