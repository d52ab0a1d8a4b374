"""A digest of a network's weights, computed once and again where they have changed."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn


class Fingerprint:
    """SHA-256 of all weights of a network and of its config; follows changes made in place."""

    def __init__(self) -> None:
        self._known: tuple[Any, str] | None = None

    def of(self, network: nn.Module, config: dict[str, Any]) -> str:
        """The hex digest.

        Args:
            network: whose state dict is hashed, names, types and shapes included.
            config: what else belongs to it; by its `repr`.

        Returns:
            64 hexadecimal digits, the same in every process and on every device.
        """
        tensors = network.state_dict(keep_vars=True)
        state = [(tensor._version, tensor.dtype) for tensor in tensors.values()]
        if self._known is None or self._known[0] != state:
            with ThreadPoolExecutor() as pool:
                parts = pool.map(_digest, tensors.values())
                total = hashlib.sha256(repr(config).encode())
                for name, part in zip(tensors, parts, strict=True):
                    total.update(name.encode())
                    total.update(part)
            self._known = (state, total.hexdigest())
        return self._known[1]


def _digest(tensor: Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous()
    head = f"{content.dtype}{list(content.shape)}".encode()
    return hashlib.sha256(head + b"\0" + content.view(-1).view(torch.uint8).numpy().data).digest()
