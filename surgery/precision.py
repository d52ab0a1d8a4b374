"""Precision: what is computed in float32 whatever the network's, and weights converted once."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def widen(x: Tensor) -> Tensor:
    """In float32, or float64 where it is.

    Args:
        x: floats of any shape.

    Returns:
        The same, without a copy where it is wide already.
    """
    return x if x.dtype == torch.float64 else x.float()


def wide_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """A layer norm in float32 (or float64), whatever the precision of its weights and of x."""
    x = widen(x)
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def wide_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in the precision of x, whatever that of its weights."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


class LowPrecision:
    """A network with its products' weights in autocast's precision already.

    Autocast itself would convert frozen weights again at every call. The numbers are the same.
    """

    def __init__(self) -> None:
        self._state: list[Any] | None = None
        self._copy: nn.Module | None = None

    def of(self, network: Any, device_type: str) -> Any:
        """The network to run: under autocast a copy, made again where a weight has changed.

        Args:
            network: frozen weights, in float32 as a rule.
            device_type: of autocast: "cpu", "cuda", ...

        Returns:
            The network itself outside of autocast, and where gradients must reach its weights.
        """
        if not torch.is_autocast_enabled(device_type):
            return network
        weights = list(network.parameters())
        dtype = torch.get_autocast_dtype(device_type)
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return network
        state = [dtype, *((id(w), w.device, w.dtype, w._version) for w in weights)]
        if self._state != state:
            with torch.inference_mode(False), torch.no_grad():
                copied = copy.deepcopy(network)
                for module in copied.modules():
                    if isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
                        for weight in module.parameters(recurse=False):
                            weight.data = weight.data.to(dtype)
            self._state, self._copy = state, copied
        return self._copy
