"""`CLIPModel` and `SiglipModel` of the Hugging Face hub, as open_clip's models.

Their configs and safetensors are read, and their names mapped; neither transformers nor any code of a
repository takes part.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from common.errors import InvalidSetting
from surgery.checkpoints import CheckpointError, read_checkpoint
from surgery.hugging_face._config import HERE, read_config, read_json
from surgery.hugging_face._names import open_clip_names

__all__ = [
    "find_weights",
    "is_named",
    "read_model",
    "read_weights",
    "timm_visual",
    "tokenizer_options",
]

_PREFIX = "hf:"
_CONFIG, _PREPROCESSING = "config.json", "preprocessor_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_T = TypeVar("_T")


class Download(Protocol):
    """Calls a function that downloads, for something that it describes; see `sources.download`."""

    def __call__(self, what: str, fetch: Callable[[], _T]) -> _T: ...


def is_named(model: str) -> bool:
    """Whether a user's name of a model is one of these: `hf:NAME`, or a folder."""
    return model.startswith(_PREFIX) or Path(model).is_dir()


def tokenizer_options(model: str, name: str) -> dict[str, str]:
    """What transformers knows a tokenizer by: that of a model's own files, or another by its name."""
    if name != HERE:
        return {"tokenizer_name": name}
    repository, _, revision = model.removeprefix(_PREFIX).partition("@")
    own = {"revision": revision} if revision and model.startswith(_PREFIX) else {}
    return {"tokenizer_name": repository if model.startswith(_PREFIX) else model, **own}


def read_model(model: str, download: Download) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's config of a model, and mean and deviation of its images.

    Args:
        model: `hf:NAME`, `hf:NAME@REVISION`, or a folder.
        download: for the first two.

    Raises:
        InvalidSetting: no such files, or of another kind of model; with the reason.
    """
    path = _find(model, _CONFIG, download)
    if path is None:
        raise InvalidSetting(
            f"{model}: no {_CONFIG} there: expected the files of a CLIPModel or SiglipModel, as "
            "save_pretrained makes them"
        )
    config = read_config(path)
    found = _find(model, _PREPROCESSING, download)
    given = {} if found is None else read_json(found)
    preprocess = {k: given[f"image_{k}"] for k in ("mean", "std") if given.get(f"image_{k}")}
    if not preprocess and "timm_model_name" in config["vision_cfg"]:
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}  # SigLIP's, as transformers has it
    return config, preprocess


def find_weights(model: str, download: Download) -> Path:
    """The safetensors of a model, or the index of several.

    Raises:
        CheckpointError: there is neither; pickles are never read.
    """
    found = _find(model, _WEIGHTS, download) or _find(model, _INDEX, download)
    if found is None:
        raise CheckpointError(
            f"{model}: neither {_WEIGHTS} nor {_INDEX} there. Pickled weights are not read: save it anew "
            "where you trust it, `model.save_pretrained(folder)`, and give that folder as `model`."
        )
    return found


def read_weights(index: Path, model: str, download: Download) -> dict[str, Tensor]:
    """Weights by open_clip's names.

    Args:
        index: of `find_weights`.
        model: where other files are, if it is an index.
        download: for those.

    Raises:
        CheckpointError: no safetensors, or not of such a model.
    """
    files = [index]
    if index.name == _INDEX:
        named = read_json(index).get("weight_map")
        names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
        if odd := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"{index}: names a file outside of its folder: {odd[0]}")
        files = []
        for name in names:
            file = _find(model, name, download)
            if file is None:
                raise CheckpointError(f"{index}: there is no {name} beside it")
            files.append(file)
    weights: dict[str, Tensor] = {}
    for file in files:
        with file.open("rb") as opened:
            if opened.read(9)[8:] != b"{":
                raise CheckpointError(f"{file}: not a safetensors file")
        weights |= read_checkpoint(file).weights
    try:
        return open_clip_names(weights)
    except KeyError as error:
        raise CheckpointError(
            f"{index}: not the weights of a CLIPModel or SiglipModel: it has no {error}"
        ) from error


def timm_visual(vision: dict[str, Any]) -> nn.Module:
    """open_clip's `TimmModel` around a trunk of the sizes that `timm_kwargs` says."""
    import timm
    from open_clip.timm_model import TimmModel
    from timm.layers.norm import LayerNorm

    sizes = dict(vision["timm_kwargs"])
    sizes["norm_layer"] = partial(LayerNorm, eps=sizes.pop("norm_eps"))
    trunk = timm.create_model(vision["timm_model_name"], num_classes=0, **sizes)
    visual = TimmModel.__new__(TimmModel)
    nn.Module.__init__(visual)
    visual.image_size, visual.trunk, visual.head = vision["image_size"], trunk, nn.Sequential()
    return visual


def _find(model: str, name: str, download: Download) -> Path | None:
    """A file of a model, from its folder, or from the hub (or its cache); None if it has no such."""
    if not model.startswith(_PREFIX):
        path = Path(model) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = model.removeprefix(_PREFIX).partition("@")

    def fetch() -> str | None:
        try:
            return str(hf_hub_download(repository, name, revision=revision or None))
        except LocalEntryNotFoundError:
            raise  # no connection: it may be there
        except EntryNotFoundError:
            return None

    found = download(f"{name} of {model}", fetch)
    return None if found is None else Path(found)
