"""Adding up, in the same order on every device; and counting pixels by integer codes."""

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
    # One more bin, after all others: to pick out those that count would cost more.
    codes = codes.masked_fill_(~counted, size).flatten()
    if codes.device.type == "cpu":
        return torch.bincount(codes, minlength=size + 1)[:-1]
    # There, bincount would ask for the least and the largest code, and the host wait for both.
    counts = torch.zeros(size + 1, dtype=torch.int64, device=codes.device)
    one = torch.ones_like(counts[:1]).expand(len(codes))
    return counts.scatter_add_(0, codes.long(), one)[:-1]


def add_rows(state: Tensor, rows: Tensor, values: Tensor) -> None:
    """``state[rows] += values``, where rows that are the same add up in their order.

    Args:
        state: [K, ...], written to.
        rows: int64 [Q].
        values: [Q, ...], of the same type.
    """
    rows, values = rows.to(state.device), values.to(state.device)
    if state.device.type == "cpu":
        state.index_add_(0, rows, values)
    else:  # whose index_add_ adds in the order of its threads
        state.index_put_((rows,), values, accumulate=True)
