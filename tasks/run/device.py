"""On what a run is computed, as ``run.json`` says it, and what its processes agree on about that."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer

from surgery.softmax_attention import by_products, choose

_LOW = {"bf16": torch.bfloat16, "16": torch.float16}
"""How Lightning's precisions of 16 bits begin."""


def describe_device(trainer: Trainer) -> dict[str, Any]:
    """On what this is computed, and what torch's last digits depend on; good to know, not compared."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "type": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def agree_on_attention(trainer: Trainer, earlier: Mapping[str, Any]) -> dict[str, str]:
    """Have all processes of a run, also those of its later jobs, compute attention in the same way.

    Where there is a choice (`surgery.softmax_attention`), the first process makes it for all of them;
    all have to call this.

    Args:
        trainer: of this process.
        earlier: of the first process, what `describe_device` and this said when the run was begun, if
            it goes on.

    Returns:
        ``{"attention": "products" or "fused"}``; empty where there is no choice.
    """
    dtype = _LOW.get(str(trainer.precision).split("-")[0])
    if dtype is None or trainer.strategy.root_device.type != "cpu":
        return {}
    name = ""
    if trainer.is_global_zero:
        name = earlier.get("attention") or ("products" if by_products(dtype) else "fused")
    name = trainer.strategy.broadcast(name, src=0)
    choose(dtype, name == "products")
    return {"attention": name}
