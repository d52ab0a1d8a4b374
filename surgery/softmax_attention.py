"""softmax(scale q . k + mask) v, by whichever way this machine is faster at."""

import logging
import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

MANY_KEYS = 512
"""Of fewer, what is around the products costs as much as these, and the fused kernel stays."""

CLEARLY = 0.9
"""How much of the fused kernel's time the products take at most, to be preferred."""

ROOM = 4 << 20
"""Logits at a time: the memory of so few is used again, and stays in the caches."""


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Scaled dot-product attention.

    torch's fused kernel, but for 16 bits and many keys on CPUs where it is slow. There it multiplies by
    Intel's MKL, which has fast products of 16 bits for Intel's processors only, while oneDNN, behind
    torch's other products, has them for AMD's with AVX-512 as well. So two products and a softmax take
    its place where they were faster in a measurement, see `by_products`; they round the logits to 16
    bits, as open_clip's own attention does on CPUs. Where gradients are recorded it is always the fused
    kernel.

    Args:
        q: [B, heads, M, d_head].
        k: [B, heads, L, d_head].
        v: as ``k``.
        mask: added to the logits, of a shape that broadcasts to [B, heads, M, L]; q's dtype.
        scale: of the logits; None: 1 / sqrt(d_head).

    Returns:
        [B, heads, M, d_head].
    """
    if (
        q.device.type == "cpu"
        and q.dtype in (torch.bfloat16, torch.float16)
        and min(q.shape[-2], k.shape[-2]) >= MANY_KEYS
        and not torch.is_grad_enabled()
        and by_products(q.dtype)
    ):
        return products(q, k, v, mask, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def products(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """`softmax_attention` by two products and a softmax, some heads at a time."""
    images, heads, asking, size = q.shape
    scale = size**-0.5 if scale is None else scale
    mask = q.new_zeros(()) if mask is None else mask
    mask = mask.expand(images, heads, asking, k.shape[-2])
    output = q.new_empty(images, heads, asking, v.shape[-1])
    step = max(1, ROOM // mask[0, 0].numel())
    for image in range(images):
        for first in range(0, heads, step):
            some = (image, slice(first, first + step))
            logits = torch.baddbmm(mask[some], q[some], k[some].transpose(-2, -1), alpha=scale)
            output[some] = logits.softmax(dim=-1) @ v[some]
    return output


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # keeps the signature
def by_products(dtype: torch.dtype) -> bool:
    """Whether `products` clearly are faster here than torch's fused kernel.

    All processes of a run should find the same, or their results would differ in the last bits, however
    busy the machine is. So it is one thread's time of the processor that counts, not the clock; of one
    size, that of 512 pixels in patches of 16; and where it was measured the two kinds of machines are far
    apart (`benchmarks/README.md`).
    """
    return ratio(dtype) < CLEARLY


@cache
def ratio(dtype: torch.dtype) -> float:
    """Time of the `products` over that of the fused kernel; measured once a process, in 0.1 s."""
    q, k, v = torch.zeros(3, 1, 1, 1025, 64, dtype=dtype).unbind()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fused, own = [], []
        for _ in range(8):  # the first of each is slower: kernels are made
            fused.append(_seconds(F.scaled_dot_product_attention, q, k, v))
            own.append(_seconds(products, q, k, v))
    finally:
        torch.set_num_threads(threads)
    # A coarse clock may find no time at all: then neither is faster.
    share = min(own) / min(fused) if min(fused) else 1.0
    log.info("attention in %s: products take %.2f of the fused kernel's time", dtype, share)
    return share


def _seconds(function: Callable[[Tensor, Tensor, Tensor], Tensor], *inputs: Tensor) -> float:
    """How long this thread's processor works for a call."""
    start = time.thread_time()
    function(*inputs)
    return time.thread_time() - start
