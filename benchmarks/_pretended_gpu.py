"""A GPU that isn't there: numbers of the CPU that say they are on ``cuda``; all work on them is counted.

Tensors made inside of `PretendedGPU` with ``device="cuda"`` are computed on the CPU; mixing them with
tensors of the host raises, as a GPU does, and every operation is counted, and every time that the host
would wait for the GPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")

WAITS = {
    "_local_scalar_dense": 1,  # item(), bool(), int(), float()
    "nonzero": 1,
    "masked_select": 1,
    "unique_dim": 1,
    "_unique2": 1,
    "unique_consecutive": 1,
    "bincount": 2,  # the smallest and the largest value
    "equal": 1,
    "repeat_interleave": 1,  # without output_size
}
"""Operations that give the host a number of the GPU's -> how often it waits for one."""


class OnGPU(Tensor):
    """A tensor that says it is on ``cuda``; its numbers are in ``host``."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnGPU:
        tensor: OnGPU = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device="meta",  # for torch itself, which would ask the driver about others
            requires_grad=False,
        )
        tensor.host = host
        return tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # an attribute there
        return CUDA

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of the PretendedGPU that its tensors belong to")

    def __repr__(self) -> str:
        return f"OnGPU({list(self.shape)}, {self.dtype})"


def _is_cuda(value: object) -> bool:
    return isinstance(value, str | torch.device) and str(value) == "cuda"


class _MadeOnHost(TorchFunctionMode):
    """Numbers of Python reach a GPU as what they are: a copy of a tensor of the host.

    Nor is torch asked which of its GPUs is the present one.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: CUDA if _is_cuda(x) else x, (args, dict(kwargs or {})))
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.to and isinstance(args[0], OnGPU) and args[1:] == (CUDA,):
            return args[0]
        if func is Tensor.pin_memory:
            return args[0]
        kwargs.pop("pin_memory", None)
        if func is Tensor.tolist and isinstance(args[0], OnGPU):
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


class _Event:
    """What `torch.cuda.Event` is while a GPU is pretended."""

    def __init__(self, gpu: PretendedGPU) -> None:
        self.gpu = gpu
        self.queued = 0

    def record(self, stream: object = None) -> None:
        self.queued = self.gpu.queued

    def synchronize(self) -> None:
        if self.gpu.arrive(self.queued):
            self.gpu.waits["an event"] += 1


class PretendedGPU(TorchDispatchMode):
    """While it is entered, ``device="cuda"`` works and is counted.

    A copy to the host that is not waited for brings its numbers when an event after it, or anything
    else, is waited for; until then there is garbage.

    Attributes:
        operations: name -> how often it ran on the GPU; views, which start nothing there, not counted.
        waits: why the host waited for the GPU -> how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.queued = 0
        self._under_way: list[tuple[int, Tensor, Tensor]] = []

    def arrive(self, queued: int | None = None) -> bool:
        """Let the first copies to the host arrive, or all; False: none was under way."""
        here = [c for c in self._under_way if queued is None or c[0] <= queued]
        self._under_way = self._under_way[len(here) :]
        for _, onto, values in here:
            onto.copy_(values)
        return bool(here)

    def _leave_later(self, onto: Tensor, values: Tensor) -> None:
        self.queued += 1
        self._under_way.append((self.queued, onto, values.clone()))
        onto.view(torch.uint8).fill_(0xA5)

    def __enter__(self) -> PretendedGPU:
        self._initialise, torch.cuda._lazy_init = torch.cuda._lazy_init, lambda: None
        self._event, torch.cuda.Event = torch.cuda.Event, lambda blocking=False: _Event(self)
        self._made_on_host = _MadeOnHost()
        self._made_on_host.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made_on_host.__exit__(*error)
        torch.cuda._lazy_init, torch.cuda.Event = self._initialise, self._event

    def put(self, module: nn.Module) -> None:
        """Bring a network's weights onto the GPU."""
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    there = OnGPU(weight.detach())
                    part._parameters[name] = nn.Parameter(there, requires_grad=False)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = OnGPU(buffer)

    def clear(self) -> None:
        """Count from nothing."""
        self.operations.clear()
        self.waits.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given: list[Tensor] = []
        tree_map(lambda x: given.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
        there = [tensor for tensor in given if isinstance(tensor, OnGPU)]
        asked = kwargs.get("device")
        onto = torch.device(asked) if asked is not None else None
        on_gpu = onto.type != "cpu" if onto else bool(there)
        if not there and not on_gpu:
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        waits = self.waits.total()
        self._count(name, func, args, kwargs, given, there, on_gpu)
        if self.waits.total() > waits:
            self.arrive()
        if name == "copy_" and not isinstance(args[0], OnGPU) and args[2:] == (True,):
            self._leave_later(args[0], args[1].host)
            return args[0]
        if onto:
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        args, kwargs = tree_map(lambda x: x.host if isinstance(x, OnGPU) else x, (args, kwargs))
        found = func(*args, **kwargs)
        if onto and there and not on_gpu and found is args[0]:
            found = found.clone()
        if not on_gpu:
            return found
        if func._schema.name.endswith("_") and there and found is args[0]:
            return given[0]
        return tree_map(lambda x: OnGPU(x) if isinstance(x, Tensor) else x, found)

    def _count(
        self,
        name: str,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        given: list[Tensor],
        there: list[Tensor],
        on_gpu: bool,
    ) -> None:
        copies = name in ("_to_copy", "copy_")
        strangers = [t for t in given if not isinstance(t, OnGPU)]
        crosses = copies and (bool(strangers) or not on_gpu)
        if strangers and not copies:
            indexing = name.startswith(("index", "_index", "_unsafe_index"))
            if indexing and isinstance(given[0], OnGPU):
                self.waits["indices of the host"] += 1  # copied over, and waited for
            elif any(t.ndim for t in strangers) or name.startswith("index"):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but {name} got "
                    f"{[(type(t).__name__, list(t.shape)) for t in given]}"
                )
        if crosses:
            leaves = not on_gpu or (not isinstance(given[0], OnGPU) and name == "copy_")
            if not kwargs.get("non_blocking") and not (name == "copy_" and args[2:] == (True,)):
                self.waits["copy to the host" if leaves else "copy from the host"] += 1
        if name in WAITS and not (name == "repeat_interleave" and kwargs.get("output_size")):
            self.waits[name] += WAITS[name]
        if name in ("index", "index_put", "index_put_"):
            masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
            self.waits["indices that are a mask"] += len(masks)
        is_view = func.is_view if hasattr(func, "is_view") else False
        if not is_view and name not in ("lift_fresh", "detach"):
            self.operations[name] += 1
