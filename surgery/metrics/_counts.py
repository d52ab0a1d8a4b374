"""Counting pixels by integer codes, without picking out those that count: that costs more."""

import torch
from torch import Tensor


def count_codes(codes: Tensor, counted: Tensor, size: int) -> Tensor:
    """How often each of the codes 0 ... size - 1 occurs where `counted`: [size] int64.

    Args:
        codes: integers, written to; those of places that aren't counted may be any.
        counted: bool, broadcastable to them.
        size: number of codes.

    Returns:
        [size] int64.
    """
    codes.masked_fill_(~counted, size)  # one more bin, after all others
    return torch.bincount(codes.flatten(), minlength=size + 1)[:-1]
