"""From what a user names (`model`, `pretrained`) to an open_clip network and where its weights lie.

Only here are open_clip's registries read; nothing is ever written into them.
"""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock
from torch import nn

from common.errors import InvalidSetting, UserError
from common.files import file_digest
from common.nearest import did_you_mean, nearest
from surgery import hugging_face, published
from surgery.architectures import patch_size, why_not
from surgery.checkpoints import Checkpoint, CheckpointError, load_weights, read_checkpoint

log = logging.getLogger(__name__)

_HUB = "hf-hub:"
DEMO = "demo"
"""Model and tag of the tiny CLIP inside this package, trained on the drawn world."""

DEMO_FOLDER = Path(__file__).parent / "demo_clip"
_RANDOM_SEED = 0
_SILENCE = 5.0  # seconds of a download until it is spoken of
_GIVE_A_FILE = "give the path of a weights file as `pretrained` (.safetensors, or .pt)"
_GIVE_A_CACHE = "copy the hub's cache of a machine that has one (HF_HOME says where)"
_NEEDS_TRANSFORMERS = "needs transformers: `pip install clip-surgery-lightning[sam]`"
_T = TypeVar("_T")


@dataclass(frozen=True)
class CheckpointInfo:
    """Where weights came from.

    Attributes:
        name: tag, path, or "random".
        path: the file that was read, if one was.
    """

    name: str
    path: str | None = None

    @property
    def where(self) -> str:
        """The same in words."""
        if self.path is None:
            return "random weights"
        inside = Path(self.path).parent == DEMO_FOLDER
        return "weights inside this package" if inside else f"weights from {self.path}"

    @cached_property
    def sha256(self) -> str | None:
        """Hex SHA-256 of the file; None for random weights."""
        return None if self.path is None else file_digest(self.path)


@dataclass(frozen=True)
class Source:
    """A built network with its weights, and what is known about both.

    Attributes:
        model: the network, of open_clip's classes.
        name: open_clip's, or the path of a config.
        config: open_clip's model config.
        checkpoint: where its weights came from.
        preprocess: open_clip's preprocessing config (mean, std, ...).
    """

    model: Any  # open_clip's classes carry no types
    name: str
    config: dict[str, Any]
    checkpoint: CheckpointInfo
    preprocess: dict[str, Any]


def build(model: str, pretrained: str | None, quick_gelu: bool | None) -> Source:
    """Build the named network and load the named weights.

    Args:
        model: as of `load_backbone`.
        pretrained: as of the same.
        quick_gelu: as of the same.

    Returns:
        The network on the CPU, in float32.

    Raises:
        InvalidSetting: names, files or settings do not fit.
        DownloadFailed: weights or config could not be fetched.
    """
    if model == DEMO and pretrained == DEMO:
        pretrained = str(DEMO_FOLDER / "model.safetensors")
    model = _settle(model)
    config, preprocess = _model_config(model)
    if reason := why_not(config):
        raise InvalidSetting(
            f"{model} can't be explained: {reason}. `lightning list models` says which can."
        )
    path, tag = _find_weights(model, pretrained)
    preprocess = {**published.agreed(model, ("mean", "std")), **preprocess, **tag}
    checkpoint = None
    if path and _is_hugging_face(model):
        weights = hugging_face.read_weights(Path(path), model, _fetch)
        checkpoint = Checkpoint(weights, openai=False)
    elif path:
        checkpoint = read_checkpoint(path)
    if quick_gelu is None:
        # OpenAI trained with quick GELU, whether or not the model's name says so.
        from_weights = tag.get("quick_gelu", False) or (
            checkpoint is not None and checkpoint.openai
        )
        quick_gelu = bool(config.get("quick_gelu", False) or from_weights)
        if path is not None and path == pretrained and not quick_gelu:
            published.doubt_activation(model, path)
    config = {**config, "quick_gelu": quick_gelu}

    network = _construct(config)
    if checkpoint is None or path is None:
        log.warning("%s has random weights (pretrained is null): maps mean nothing.", model)
        info = CheckpointInfo("random")
    else:
        load_weights(network, checkpoint.weights, source=path)
        info = CheckpointInfo(pretrained or model, path)
    return Source(network, model, config, info, preprocess)


def _find_weights(model: str, pretrained: str | None) -> tuple[str | None, dict[str, Any]]:
    """Path of the named weights, downloaded where they have to be, and what open_clip knows of them."""
    import open_clip

    if _is_hugging_face(model):
        if pretrained is not None:
            raise InvalidSetting(
                f"{model} brings its own weights: pretrained has to be null "
                f"(--model.backbone.pretrained null), given {pretrained!r}"
            )
        return str(hugging_face.find_weights(model, _fetch)), {}
    if pretrained is None:
        if not model.startswith(_HUB):
            return None, {}
        what = f"the weights of {model}"
        return download(what, lambda: _from_hub(model, None), _GIVE_A_FILE), {}
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    if tag:
        what = f"{pretrained!r} weights of {model}"
        return str(download(what, lambda: open_clip.download_pretrained(tag), _GIVE_A_FILE)), tag
    if Path(pretrained).suffix or Path(pretrained).exists():
        return pretrained, {}
    raise _unknown_weights(model, pretrained)


def _is_hugging_face(model: str) -> bool:
    import open_clip

    return model not in open_clip.list_models() and hugging_face.is_named(model)


def _fetch(what: str, fetch: Callable[[], _T]) -> _T:
    """`download` of a file of a Hugging Face model."""
    return download(what, fetch, "give the path of a folder with the model's files as `model`")


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model that is named as in `load_backbone`, without its network."""
    model = _settle(model)
    return tokenizer(model, _model_config(model)[0])


def input_sizes(model: str) -> tuple[int, int]:
    """Side of the images that a model was trained on, and what sides must be multiples of, in pixels."""
    vision = _model_config(_settle(model))[0]["vision_cfg"]
    patch = patch_size(vision)
    return vision["image_size"] // patch * patch, patch


def tokenizer(name: str, config: dict[str, Any]) -> Any:
    """The stock open_clip tokenizer of a model; `config` is its model config."""
    import open_clip
    from open_clip.tokenizer import HFTokenizer

    text = config["text_cfg"]
    options = dict(text.get("tokenizer_kwargs") or {})
    context = text.get("context_length", 77)
    on_hub = text.get("hf_tokenizer_name")

    def make() -> Any:
        if name in open_clip.list_models() or name.startswith(_HUB):
            return open_clip.get_tokenizer(name)
        if on_hub:
            mode = text.get("tokenizer_mode")
            found = hugging_face.tokenizer_options(name, on_hub)
            return HFTokenizer(**found, context_length=context, tokenizer_mode=mode, **options)
        return open_clip.SimpleTokenizer(context_length=context, **options)

    if on_hub and find_spec("transformers") is None:
        raise InvalidSetting(f"the tokenizer of {name} {_NEEDS_TRANSFORMERS}")
    if on_hub or name.startswith(_HUB):
        return download(f"the tokenizer of {name}", make, _GIVE_A_CACHE)
    return make()


def _settle(model: str) -> str:
    """A user's name of a model as open_clip's name, or as the path of a config."""
    import open_clip

    if model == DEMO:
        return str(DEMO_FOLDER / "config.json")
    dashed = model.replace("/", "-")  # OpenAI writes ViT-B/16
    return dashed if dashed in open_clip.list_models() else model


def _model_config(model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's config and what is known of its preprocessing."""
    import open_clip

    if model.startswith(_HUB):
        found = download(
            f"the config of {model}",
            lambda: _from_hub(model, "open_clip_config.json"),
            "give the path of an open_clip JSON config as `model`",
        )
        return _read_config(Path(found))
    if model in open_clip.list_models():
        return open_clip.get_model_config(model), {}
    if _is_hugging_face(model):
        return hugging_face.read_model(model, _fetch)
    if Path(model).is_file():
        return _read_config(Path(model))
    names = open_clip.list_models()
    near = nearest(model, names, 5)
    kind = "no such config file" if model.endswith(".json") else "no such model"
    hint = f"near: {', '.join(near)}" if near else f"open_clip knows {len(names)} names"
    raise InvalidSetting(
        f"{kind}: {model!r} ({hint}). Give an open_clip model name, the path of an open_clip JSON "
        "config, or a Hugging Face model (hf:NAME, or its folder)."
    )


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidSetting(f"{path}: not a JSON config ({error})") from error
    preprocess: dict[str, Any] = {}
    if isinstance(content, dict) and "model_cfg" in content:
        content, preprocess = content["model_cfg"], content.get("preprocess_cfg") or {}
    needed = ("embed_dim", "vision_cfg", "text_cfg")
    missing = [key for key in needed if not isinstance(content, dict) or key not in content]
    if missing:
        raise InvalidSetting(f"{path}: not an open_clip model config, missing {', '.join(missing)}")
    return content, preprocess


def _construct(config: dict[str, Any]) -> nn.Module:
    """An open_clip network with random weights that are the same in every process."""
    from open_clip.model import CLIP, CustomTextCLIP

    config = json.loads(json.dumps(config))  # open_clip edits nested dicts in place
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
        _fetch_text_config(config["text_cfg"]["hf_model_name"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        if "timm_kwargs" not in config["vision_cfg"]:
            return (CustomTextCLIP if custom else CLIP)(**config)
        # Sizes that open_clip's configs can't say: its model around a tower of our own making
        visual = hugging_face.timm_visual(config["vision_cfg"])
        small = {"layers": 1, "width": 8, "head_width": 8, "patch_size": 8, "image_size": 8}
        network = CustomTextCLIP(**{**config, "vision_cfg": small})
        network.visual = visual
        return network


def _from_hub(model: str, filename: str | None) -> str:
    from open_clip.pretrained import download_pretrained_from_hf

    return str(download_pretrained_from_hf(model.removeprefix(_HUB), filename=filename))


def _fetch_text_config(name: str) -> None:
    """Have the config of a text tower of the hub at hand, of which open_clip builds it."""
    if find_spec("transformers") is None:
        raise InvalidSetting(f"the text tower {name} {_NEEDS_TRANSFORMERS}")
    import transformers

    download(
        f"the config of the text tower {name}",
        lambda: transformers.AutoConfig.from_pretrained(name),
        _GIVE_A_CACHE,
    )


class DownloadFailed(UserError, RuntimeError):
    """Weights could not be downloaded."""


def download(what: str, fetch: Callable[[], _T], instead: str) -> _T:
    """What ``fetch`` finds in the hub's cache, or downloads; without the hub client's many lines.

    One process at a time: of all ranks of a node, or of all nodes with one cache folder, the first one
    downloads, and the others find what it did.

    Args:
        what: it is, in words.
        fetch: asks the hub client for it.
        instead: what a user can do without a connection.

    Raises:
        DownloadFailed: it can't be had.
    """
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # it tells of every one of its many attempts
    alive = threading.Timer(_SILENCE, log.info, ["still downloading %s (or trying to)", what])
    alive.daemon = True
    alive.start()
    try:
        with _alone(what):
            return fetch()
    except Exception as error:  # open_clip and its hub client raise many kinds
        said = " ".join(str(error).split())
        raise DownloadFailed(
            f"downloading {what} failed ({type(error).__name__}: {said}). Without a connection, "
            f"{instead}."
        ) from None
    finally:
        alive.cancel()
        hub.setLevel(level)


@contextmanager
def _alone(what: str) -> Iterator[None]:
    """While no other process with the same cache folder does the same."""
    with ExitStack() as held:
        if (folder := cache_folder()) is not None:
            name = hashlib.sha256(what.encode()).hexdigest()[:24]
            with suppress(OSError, NotImplementedError):  # not writable, or without locks
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(folder / f"{name}.lock"))
        yield


def cache_folder() -> Path | None:
    """Where things are kept between runs: $CLIP_SURGERY_CACHE, or clip_surgery in the user's cache."""
    if own := os.environ.get("CLIP_SURGERY_CACHE"):
        return Path(own)
    with suppress(RuntimeError):  # no home folder: no cache
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clip_surgery"
    return None


def _unknown_weights(model: str, pretrained: str) -> CheckpointError:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    known = f"{model} has the tags {', '.join(tags)}" if tags else f"{model} has no tags"
    return CheckpointError(
        f"pretrained={pretrained!r} is neither a tag of the model nor a file. {known}"
        f"{did_you_mean(pretrained, tags) or '.'}"
    )
