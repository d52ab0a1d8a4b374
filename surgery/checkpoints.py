"""Weights from files, without ever running code from them.

Read by what the file is, not by its name: safetensors; a state dict or an open_clip training
checkpoint saved by torch; OpenAI's published TorchScript archives. A pickled module is refused.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import InvalidSetting

# What OpenAI's archives hold beside weights.
_NOT_WEIGHTS = frozenset({"input_resolution", "context_length", "vocab_size", "attn_mask"})
_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
)
ROWS, IDS = "token_embedding.rows", "token_embedding.ids"
"""Names of a table of token embeddings of which only some rows are stored."""

_CONVERT = (
    "Convert it where you trust it: `torch.save(model.state_dict(), 'weights.pt')`, "
    "or `safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')`."
)


class CheckpointError(InvalidSetting):
    """A weights file that is missing, unreadable, unsafe, or of another model."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights read from a file.

    Attributes:
        weights: name -> tensor, on the CPU.
        openai: the file is in OpenAI's format, whose models use quick GELU.
    """

    weights: dict[str, Tensor]
    openai: bool


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the state dict in a weights file, on the CPU, wrappers and prefixes taken off.

    Args:
        path: safetensors, a state dict or training checkpoint of torch, or OpenAI's archive.

    Returns:
        Names as in a model's state dict, and floats or integers that are there and finite.

    Raises:
        CheckpointError: the file, which it names, is missing, not understood, would have to run
            code, or holds what is no weight of a network.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such weights file: {path}")
    with path.open("rb") as file:
        head = file.read(9)
    archive = False
    if head[8:9] == b"{":
        found = _read_safetensors(path)
    elif zipfile.is_zipfile(path) and _is_torchscript(path):
        found, archive = _read_torchscript(path), True
    else:
        found = _read_torch(path)
    weights = _unwrap(found, path)
    openai = archive or "input_resolution" in weights
    weights = {
        name: value for name, value in weights.items() if name.split(".")[-1] not in _NOT_WEIGHTS
    }
    for name, value in weights.items():
        if fault := _fault(value):
            raise CheckpointError(f"{path}: {name!r} is {fault}. {_CONVERT}")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name!r} claims more numbers than the file holds")
        # Adding up is one pass; whatever is not finite survives it.
        finite = not value.is_floating_point() or value.sum(dtype=torch.float32).isfinite()
        if not finite and not value.isfinite().all():
            raise CheckpointError(f"{path}: weights are not finite (NaN or infinite) in {name!r}")
    return Checkpoint(weights, openai)


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy a state dict into an open_clip model; every key and shape has to match.

    An older layout, in which the text tower is at the top level, is converted, and a table of token
    embeddings may be given by those of its rows that are not zero (`ROWS`, `IDS`).

    Args:
        model: to be filled, in its own number types.
        weights: names as in its state dict.
        source: where they come from, for errors.

    Raises:
        CheckpointError: they are of another model; names the source and the first differences.
    """
    from open_clip.model import convert_to_custom_text_state_dict

    weights = _whole_vocabulary(dict(weights), model.state_dict(), source)
    if "positional_embedding" in weights and not hasattr(model, "positional_embedding"):
        weights = convert_to_custom_text_state_dict(weights)
    own = model.state_dict()
    for name in ("logit_scale", "logit_bias"):
        if name in weights and name in own and weights[name].numel() == own[name].numel() == 1:
            weights[name] = weights[name].reshape(own[name].shape)
    problems = []
    if missing := [name for name in own if name not in weights]:
        problems.append(f"{len(missing)} keys missing ({_first(missing)})")
    if unexpected := [name for name in weights if name not in own]:
        problems.append(f"{len(unexpected)} keys unexpected ({_first(unexpected)})")
    shapes = [
        f"{name}: expected {list(own[name].shape)}, given {list(value.shape)}"
        for name, value in weights.items()
        if name in own and own[name].shape != value.shape
    ]
    types = [
        f"{name}: expected floats, given {value.dtype}"
        for name, value in weights.items()
        if name in own and own[name].is_floating_point() > value.is_floating_point()
    ]
    if types:
        problems.append(f"{len(types)} types differ ({_first(types)})")
    if shapes:
        problems.append(f"{len(shapes)} shapes differ ({_first(shapes)})")
    if problems:
        raise CheckpointError(
            f"{source} holds weights of another model: {'; '.join(problems)}. Choose the model "
            "(an open_clip name or JSON config) that these weights were trained as."
        )
    model.load_state_dict(weights)


def _whole_vocabulary(
    weights: dict[str, Tensor], own: dict[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Weights with a whole table of token embeddings, where the file has only some of its rows.

    A model that learned few words is stored as the rows `token_embedding.rows` [K, D] of the tokens
    `token_embedding.ids` [K]; all other rows are zeros.
    """
    name = "token_embedding.weight"
    if ROWS not in weights or IDS not in weights or name in weights or name not in own:
        return weights  # what doesn't fit is told with all other names
    rows, ids = weights.pop(ROWS), weights.pop(IDS)
    size, width = own[name].shape
    fits = rows.shape == (*ids.shape, width) and ids.dtype == torch.int64 and ids.ndim == 1
    if not fits or len(ids.unique()) < len(ids) or not ((ids >= 0) & (ids < size)).all():
        raise CheckpointError(
            f"{source}: {ROWS} {list(rows.shape)} and {IDS} {list(ids.shape)} are not rows of a table "
            f"of {size} tokens with {width} channels"
        )
    weights[name] = rows.new_zeros(size, width).index_copy(0, ids, rows)
    return weights


def _fault(value: Tensor) -> str | None:
    """Why a tensor can't be the weight of a network; None if it can."""
    if value.is_meta:
        return "without values (on the device `meta`)"
    if value.layout is not torch.strided:
        return f"a sparse tensor ({value.layout})"
    if value.is_quantized:
        return f"quantised ({value.dtype})"
    if type(value) not in (Tensor, nn.Parameter):
        return f"a tensor of another kind ({type(value).__name__})"
    if value.dtype not in _DTYPES:
        return f"of a type that weights don't have ({value.dtype})"
    return None


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def _read_torch(path: Path) -> Any:
    mapped = zipfile.is_zipfile(path)
    if mapped:
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    _check_stored(member)
        except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path}: refused: {error}. {_CONVERT}") from error
    try:
        # Mapped, the optimizer's state in a training checkpoint is never read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused. It holds Python objects, such as a whole pickled module, and not "
            f"only tensors (or is no weights file at all); reading it could run code. {_CONVERT}"
        ) from error
    except Exception as error:  # torch's unpickler fails on foreign bytes in any way
        raise CheckpointError(
            f"{path}: not a weights file that can be read (safetensors, a torch state dict, an "
            f"open_clip checkpoint or OpenAI's archive is expected): {error}"
        ) from error


def _unwrap(found: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path}: expected a state dict, given {type(found).__name__}")
    odd = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if odd:
        raise CheckpointError(
            f"{path}: not tensors in its state dict: {_first([str(name) for name in odd])}"
        )
    if unnamed := [name for name in found if not isinstance(name, str)]:
        raise CheckpointError(
            f"{path}: names in a state dict are texts, given {unnamed[0]!r} ({len(unnamed)} of "
            f"{len(found)} names are none)"
        )
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


# TorchScript archives: a zip with a pickle of attributes (data.pkl), storages (data/N), and code.
# torch.jit.load would compile and run the code; here it is never even opened.


class _Inert:
    """Stands for an object of a class that only exists as code inside the archive."""

    def __init__(self, *_: Any) -> None:
        pass


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _as_is(value: Any, *_: Any) -> Any:
    return value


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{
        ("torch.jit._pickle", name): _as_is
        for name in (
            "build_intlist",
            "build_doublelist",
            "build_boollist",
            "build_tensorlist",
            "restore_type_tag",
        )
    },
    **{
        ("torch", f"{name}Storage"): dtype
        for name, dtype in {
            "Double": torch.float64,
            "Float": torch.float32,
            "Half": torch.float16,
            "BFloat16": torch.bfloat16,
            "Long": torch.int64,
            "Int": torch.int32,
            "Short": torch.int16,
            "Char": torch.int8,
            "Byte": torch.uint8,
            "Bool": torch.bool,
        }.items()
    },
}


class _ArchiveUnpickler(pickle.Unpickler):
    """Reads data.pkl: tensors and inert objects, nothing else can be named."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(_stored(archive, f"{root}/data.pkl")))
        self._inert: type[_Inert] = type("_Inert", (_Inert,), {})  # its own: BUILD may write to it
        self._archive = archive
        self._root = root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return self._inert
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _device, _count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown record {kind!r}")
        if key not in self._storages:
            content = bytearray(_stored(self._archive, f"{self._root}/data/{key}"))
            self._storages[key] = (
                torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            )
        return self._storages[key]


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    member = archive.getinfo(name)
    _check_stored(member)
    return archive.read(member)


def _check_stored(member: zipfile.ZipInfo) -> None:
    """Check that a member is stored as it is, as torch does: so it can't be larger than its file.

    Raises:
        pickle.UnpicklingError: it is compressed, and may inflate to any size.
    """
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
        raise pickle.UnpicklingError(
            f"{member.filename} is compressed, which torch never does ({member.compress_size} bytes "
            f"inflate to {member.file_size})"
        )


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any(name.endswith("/constants.pkl") for name in names)


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            (data,) = (
                name
                for name in archive.namelist()
                if name.count("/") == 1 and name.endswith("/data.pkl")
            )
            module = _ArchiveUnpickler(archive, data.split("/")[0]).load()
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(
            f"{path}: refused, not a plain TorchScript archive: {error}. {_CONVERT}"
        ) from error
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: damaged TorchScript archive: {error}") from error
    weights: dict[str, Tensor] = {}
    _collect(module, "", weights)
    return weights


def _collect(module: Any, prefix: str, weights: dict[str, Tensor]) -> None:
    """Flatten a tree of inert objects to state dict names."""
    for name, value in vars(module).items() if isinstance(module, _Inert) else ():
        if isinstance(value, Tensor):
            weights[prefix + name] = value
        elif isinstance(value, _Inert):
            _collect(value, f"{prefix}{name}.", weights)
