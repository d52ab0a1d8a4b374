"""What all tasks share: the backbone, the class texts, and metrics that are kept shard by shard."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

import datamodules
from common.errors import InvalidSetting
from datamodules import DATASETS
from datamodules.samples import VOID, DatasetInfo
from datamodules.shards import ShardDataModule
from surgery import Backbone, ImageTokens, encode_prompts, load_backbone
from tasks import TASKS
from tasks._tables import Table
from tasks._texts import read_text_features


@dataclass(frozen=True)
class BackboneConfig:
    """Which CLIP, and how it is read; see `surgery.load_backbone`.

    Args:
        model: an open_clip name (ViT-B-16, RN50, ...), the path of an open_clip JSON config, or
            `demo`, the tiny CLIP inside this package.
        pretrained: an open_clip tag (openai, laion2b_s34b_b88k, ...), the path of a checkpoint, or
            null for random weights.
        attention: how the image tower is reformed: surgery (the paper), raw (plain CLIP), ...;
            `lightning list models` names them all.
        blocks: how many of the last blocks are reformed.
        image_size: side of the input in pixels; by default the model's own.
        class_token: clip is CLIP's own, released what the released code returns (ResNets differ).
        quick_gelu: use OpenAI's GELU; by default as the weights need it.
        compile: run the image tower through torch.compile, for batches of --data.batch_size images:
            slow to start, for long runs on a GPU.
    """

    model: str = "ViT-B-16"
    pretrained: str | None = "openai"
    attention: str = "surgery"
    blocks: int = 6
    image_size: int | None = None
    class_token: str = "clip"
    quick_gelu: bool | None = None
    compile: bool = False


class ImageResult(NamedTuple):
    """What a task says of one image; the writer turns it into files.

    ``members``: file ending -> array (``*.npy``), label values uint8 [H,W] (``*.png``), or dict
    (``json``). ``overlays``: the same for pictures uint8 [H,W,3] (``*.jpg``) that are only drawn when
    the writer wants them. ``rows``: table name -> this image's row in it, column -> value; the writer
    makes one parquet file a table and shard, with the column ``key`` in front.
    """

    key: str
    members: dict[str, Any]
    overlays: Callable[[], dict[str, np.ndarray]] | None = None
    rows: dict[str, dict[str, Any]] | None = None


@dataclass(frozen=True)
class Report:
    """The numbers of a run.

    Args:
        metrics: name -> value over the whole run; fractions.
        per_class: class name -> column -> value.
        baseline: the same metrics of plain CLIP, where it was measured beside.
        details: what else is worth knowing, such as the best threshold.
        tables: file name without ending -> what is written as csv beside, some with a plot.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    baseline: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)


class Task(LightningModule):
    """Base of all tasks.

    A subclass writes ``predict_step`` (batch -> one `ImageResult` an image), and, where there is
    something to measure, ``configure_metrics`` and ``report``. Metrics are updated in
    ``predict_step``; the writer takes their states at the end of every shard.

    Args:
        backbone: which CLIP, and how it is read.
        text_features: safetensors file with [T,C] features of the class texts, to use in place of
            prompts; with names (metadata ``names``, a JSON list) they are matched to the classes.
    """

    wants_originals: bool = False
    """Whether the task also reads the images at their own size (``Batch.originals``)."""

    needs: tuple[str, ...] = ()
    """What a data set must have for this task: "classes", "mask", "positives", "captions"."""

    text: Tensor | None
    """[T,C] unit features of the class texts."""

    def __init__(
        self, backbone: BackboneConfig | None = None, text_features: str | None = None
    ) -> None:
        super().__init__()
        self.config = backbone or BackboneConfig()
        self.text_features = text_features
        self.backbone: Backbone
        self.metrics: dict[str, Metric] = {}
        self.register_buffer("text", None, persistent=False)

    @property
    def datamodule(self) -> ShardDataModule:
        """Where the batches come from."""
        found = getattr(self.trainer, "datamodule", None)
        if not isinstance(found, ShardDataModule):
            raise TypeError(
                "predict needs one of the project's DataModules: pass datamodule=VOC(...)"
            )
        return found

    @property
    def info(self) -> DatasetInfo:
        """The data set that is being processed."""
        return self.datamodule.info

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images that the backbone wants."""
        return self.backbone.image_size

    def setup(self, stage: str) -> None:
        """Load the backbone and encode the class texts; on every process alike."""
        self.check_data(self.datamodule)
        if self.text_features:  # before the weights: a file that doesn't fit is refused at once
            aliases = dict(zip(self.info.prompts, self.info.classes, strict=True))
            self.text = read_text_features(self.text_features, self.words(self.info), aliases)
        options = asdict(self.config)
        compiled = options.pop("compile")
        batch = self.datamodule.batch_size if compiled else None
        self.backbone = load_backbone(**options, static_batch=batch)
        self.metrics = self.configure_metrics(self.datamodule.info)
        self.configure_texts()

    def check_data(self, datamodule: ShardDataModule) -> None:
        """Refuse a data set without what this task needs, before anything is loaded.

        Raises:
            ValueError: says what is missing, and what fits; or that compiling doesn't.
        """
        if self.config.compile and not self.sees_one_size(datamodule):
            raise InvalidSetting(
                "--model.backbone.compile is for images of one size: leave --data.resize at squash, or "
                "give Segmentation a --model.window"
            )
        has = offers(datamodule.info)
        lacking = [need for need in self.needs if need not in has]
        if lacking:
            task, data = type(self).__name__, type(datamodule).__name__
            hint = datamodule.lacking(lacking[0])
            raise InvalidSetting(
                f"{task} needs {' and '.join(lacking)}, which {data} doesn't have"
                f"{hint and f' ({hint})'}. Tasks that fit {data}: {', '.join(fitting_tasks(has))}. "
                f"Data sets that fit {task}: {', '.join(fitting_datasets(self.needs))}"
            )

    def sees_one_size(self, datamodule: ShardDataModule) -> bool:
        """Whether all that the backbone is given has one size, in pixels."""
        return datamodule.resize == "squash"

    def settings(self) -> dict[str, Any]:
        """What the class was made with; every argument is kept as an attribute of its name."""
        names = [n for n in inspect.signature(type(self)).parameters if n != "backbone"]
        return {"backbone": asdict(self.config), **{n: getattr(self, n) for n in names}}

    def words(self, info: DatasetInfo) -> list[str]:
        """The words whose features are the rows of ``text``; one a class."""
        return list(info.prompts)

    def configure_texts(self) -> None:
        """Encode the class texts once, where no file gave their features."""
        words = self.words(self.info)
        if words and not self.text_features:
            self.text = encode_prompts(self.backbone, self.backbone.tokenizer, words)
        if self.text is not None and self.text.shape[1] != self.backbone.embed_dim:
            raise InvalidSetting(
                f"{self.text_features} has features of {self.text.shape[1]} channels, but "
                f"{self.config.model} has {self.backbone.embed_dim}: they are of another backbone"
            )

    def encode_images(
        self, images: Tensor | list[Tensor], attention: str | None = None
    ) -> list[ImageTokens]:
        """Tokens of each of B images (of 1 each), which may differ in size.

        ``attention`` reads the backbone by another recipe than its own.
        """
        backbone = self.backbone.with_attention(attention) if attention else self.backbone
        if isinstance(images, list):
            return [backbone.encode_image(backbone.preprocess(image[None])) for image in images]
        if not len(images):
            return []
        tokens = backbone.encode_image(backbone.preprocess(images))
        return [
            ImageTokens(tokens.class_token[i : i + 1], tokens.patch_tokens[i : i + 1], tokens.grid)
            for i in range(len(images))
        ]

    def configure_metrics(self, info: DatasetInfo) -> dict[str, Metric]:
        """The metrics of this task on this data set, empty."""
        return {}

    def report(self, metrics: dict[str, Metric], info: DatasetInfo) -> Report:
        """The numbers of a run, from metrics that hold all its shards."""
        return Report({})

    def on_predict_start(self) -> None:
        """Keep the metrics where the tokens are; Apple's GPUs have no float64."""
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        self.metrics = {name: metric.to(device) for name, metric in self.metrics.items()}

    def pop_metric_state(self) -> dict[str, Tensor]:
        """States of all metrics since the last call, on the CPU, as ``metric.state`` -> tensor."""
        states: dict[str, Tensor] = {}
        for name, metric in self.metrics.items():
            for key, value in metric.metric_state.items():
                merged = torch.cat(value) if isinstance(value, list) and value else value
                if isinstance(merged, Tensor):
                    states[f"{name}.{key}"] = merged.cpu().clone()
            metric.reset()
        return states


def offers(info: DatasetInfo) -> frozenset[str]:
    """What a data set has of that which tasks may need."""
    has = {
        "classes": bool(info.classes),
        "mask": info.labels == "mask",
        "positives": info.labels in ("mask", "positives"),
        "captions": info.captions,
    }
    return frozenset(name for name, there in has.items() if there)


def fitting_tasks(has: frozenset[str]) -> list[str]:
    """Tasks that need nothing but what a data set has."""
    found = (getattr(import_module(f"tasks.{module}"), cls) for module, cls in TASKS.items())
    return sorted(task.__name__ for task in found if has.issuperset(task.needs))


def fitting_datasets(needs: tuple[str, ...]) -> list[str]:
    """DataModules that have all that a task needs."""
    found = (getattr(datamodules, cls) for cls in DATASETS.values())
    return sorted(cls.__name__ for cls in found if offers(cls.info).issuperset(needs))


def label_masks(
    label: Tensor, positives: tuple[int, ...], info: DatasetInfo, *, void: str = "ignore"
) -> tuple[Tensor, Tensor]:
    """Foreground of each positive label, and which pixels count at all.

    Args:
        label: label map [H,W], or masks [P,H,W] in the order of ``positives``.
        positives: [P] class indices.
        info: the data set that the label values belong to.
        void: ``ignore`` leaves void pixels out, ``background`` counts them as background.

    Returns:
        foreground bool [P,H,W], valid bool broadcastable to it.
    """
    if label.ndim == 3:
        foreground, empty = label == 1, VOID
    else:
        empty = info.void
        values = torch.tensor([info.label_value(i) for i in positives], device=label.device)
        foreground = label == values.view(-1, 1, 1)
    valid = label != empty if void == "ignore" else torch.ones_like(label, dtype=torch.bool)
    return foreground, valid
