"""softmax(scale q . k + mask) v, by whichever way this machine is faster at."""

import logging
import time
from collections.abc import Callable
from threading import Lock

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
    bits, as open_clip's own attention does on CPUs. Where gradients are recorded, and in a compiled
    network (in which the products of all images would be unrolled), it is always the fused kernel.

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
        and not torch.compiler.is_compiling()
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
    step = max(1, ROOM // (asking * k.shape[-2]))
    for image in range(images):
        for first in range(0, heads, step):
            some = (image, slice(first, first + step))
            logits = torch.baddbmm(mask[some], q[some], k[some].transpose(-2, -1), alpha=scale)
            output[some] = logits.softmax(dim=-1) @ v[some]
    return output


_chosen: dict[torch.dtype, bool] = {}
_choosing = Lock()


def by_products(dtype: torch.dtype) -> bool:
    """Whether this process takes `products`: as it was told to (`choose`), or as `ratio` found once.

    The processes of a run take the same, or their results would differ in the last bits: the first one
    chooses.
    """
    with _choosing:
        if dtype not in _chosen:
            _chosen[dtype] = ratio(dtype) < CLEARLY
        return _chosen[dtype]


def choose(dtype: torch.dtype, products: bool) -> None:
    """From now on this process takes `products` for tensors of a dtype, or does not."""
    with _choosing:
        _chosen[dtype] = products


def ratio(dtype: torch.dtype) -> float:
    """Time of the `products` over that of the fused kernel, measured in 0.1 s.

    It is the processor's time of one thread, not the clock's, so that a busy machine finds much the same
    as a quiet one; of one size, that of 512 pixels in patches of 16. Where it was measured, kinds of
    machines are far apart (`benchmarks/README.md`). torch has one thread meanwhile: threads that call it
    for the first time just then keep to that.
    """
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
