"""What all tasks share: the backbone, the class texts, what they need of a data set."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

import datamodules
from common.errors import InvalidSetting
from datamodules import DATASETS
from datamodules._datamodule import ShardDataModule
from datamodules._samples import DatasetInfo
from surgery import TEMPLATES, Backbone, ImageTokens, Texts, explain, load_backbone
from surgery.attention import recipe_of
from surgery.methods import check_towers
from tasks import TASKS
from tasks._draw import LOOK, Look
from tasks._text_features import read_text_features
from tasks.measures import Measures
from tasks.run.processes import shared_counts

_GATHERING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class BackboneConfig:
    """Which CLIP, and how it is read; see `surgery.load_backbone`.

    Args:
        model: an open_clip name (ViT-B-16, RN50, ...), the path of an open_clip JSON config, a Hugging
            Face model (hf:NAME, or its folder), or `demo`, the tiny CLIP inside this package.
        pretrained: an open_clip tag (openai, laion2b_s34b_b88k, ...), the path of a checkpoint, or
            null: those that a Hugging Face model brings, or random weights.
        attention: how the image tower is reformed: surgery (the paper), raw (plain CLIP), ...;
            `lightning list recipes` names them all. With fields of `surgery.Recipe` that are otherwise:
            ``attention.name sc_clip``, ``attention.class_share 0.2``.
        blocks: how many of the last blocks are reformed, or the first of them: "from 7" is the
            paper's d = 7 read literally, 18 blocks of ViT-L/14.
        image_size: side of the input in pixels; by default the model's own.
        class_token: clip is CLIP's own, released what the released code returns (ResNets differ).
        quick_gelu: use OpenAI's GELU; by default as the weights need it.
        compile: run the image tower through torch.compile, for batches of --data.batch_size images:
            slow to start, for long runs on a GPU.
    """

    model: str = "ViT-B-16"
    pretrained: str | None = "openai"
    attention: str | dict[str, Any] = "surgery"
    blocks: int | str = 6
    image_size: int | None = None
    class_token: str = "clip"
    quick_gelu: bool | None = None
    compile: bool = False


DEFAULT_BACKBONE = BackboneConfig()


class Task(LightningModule):
    """Base of all tasks.

    A subclass writes ``predict_step`` (batch -> one `ImageResult` an image), and, where there is
    something to measure, names its `Measures`, which it updates in ``predict_step``; the run takes
    their states at the end of every shard.

    Args:
        backbone: which CLIP, and how it is read.
        text_features: safetensors file with [T,C] features of the class texts, to use in place of
            prompts; with names (metadata ``names``, a JSON list) they are matched to the classes.
    """

    measured_by: type[Measures] = Measures
    """What is measured; `tasks.measures` has those of all tasks."""

    measures: Measures

    draws: bool = False
    """Whether the run wants pictures too (``--writer.overlays``)."""

    look: Look = LOOK
    """How they are drawn."""

    wants_originals: bool = False
    """Whether the task also reads the images at their own size (``Sample.original``)."""

    needs: tuple[str, ...] = ()
    """What a data set must have for this task: "classes", "mask", "positives", "captions"."""

    methods: Sequence[str] = ()
    """What explains the images, where the task does that; see `surgery.METHODS`."""

    prompt_templates: Sequence[str] = TEMPLATES
    """What words are put into, each with one {}."""

    measures_on_host: bool = False
    """Whether what is measured is on the host already when it is."""

    texts: Texts | None = None
    """The class texts, unit features [T,C]; no part of the network, so no precision is theirs."""

    def __init__(
        self, backbone: BackboneConfig = DEFAULT_BACKBONE, text_features: str | None = None
    ) -> None:
        super().__init__()
        self.config = backbone
        self.text_features = text_features
        self.backbone: Backbone

    @property
    def datamodule(self) -> ShardDataModule:
        """Where the batches come from."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, ShardDataModule):
            raise TypeError(
                "predict needs one of the project's DataModules: pass datamodule=VOC(...)"
            )
        return datamodule

    @property
    def info(self) -> DatasetInfo:
        """The data set that is being processed."""
        return self.datamodule.info

    def setup(self, stage: str) -> None:
        """Load the backbone and encode the class texts; on every process alike."""
        self.check_data(self.datamodule)
        if self.text_features:  # before the weights: a file that doesn't fit is refused at once
            aliases = dict(zip(self.info.prompts, self.info.classes, strict=True))
            features = read_text_features(self.text_features, self.words(self.info), aliases)
            self.texts = Texts(features)
        options = asdict(self.config)
        compiled = options.pop("compile")
        batch = self.datamodule.batch_size if compiled else None
        self.backbone = load_backbone(**options, static_batch=batch)
        check_towers(self.methods, self.backbone)
        counts = shared_counts(self.trainer)
        self.datamodule.wanted = replace(
            self.datamodule.wanted,
            image_size=self.backbone.image_size,
            patch_size=self.backbone.patch_size,
            originals=self.wants_originals,
            counter=counts and partial(counts, "shards"),
        )
        self.measures = self.new_measures()
        self.configure_texts()

    def check_data(self, datamodule: ShardDataModule) -> None:
        """Refuse a data set, or a recipe, without what it needs, before anything is loaded.

        Raises:
            InvalidSetting: says what is missing, and what fits; or that the recipe or compiling doesn't.
        """
        if self.config.compile and not self.has_one_image_size(datamodule):
            raise InvalidSetting(
                "--model.backbone.compile is for images of one size: leave --data.resize at squash, or "
                "give Segmentation a --model.window"
            )
        if recipe_of(self.config.attention).needs_texts and "classes" not in self.needs:
            raise InvalidSetting(
                f"--model.backbone.attention {self.config.attention!r} reads images by the class texts, "
                f"which {type(self).__name__} doesn't have"
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

    def has_one_image_size(self, datamodule: ShardDataModule) -> bool:
        """Whether all that the backbone is given has one size, in pixels."""
        return datamodule.resize == "squash"

    def settings(self) -> dict[str, Any]:
        """What the class was made with; every argument is kept as an attribute of its name."""
        names: dict[str, None] = {}
        for cls in type(self).__mro__:
            if "__init__" in vars(cls):
                parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
                names |= {p.name: None for p in parameters if p.kind not in _GATHERING}
                if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
                    break  # else its base takes what it doesn't name
        ours = [name for name in names if name not in ("self", "backbone")]
        return {"backbone": asdict(self.config), **{name: getattr(self, name) for name in ours}}

    def described(self) -> dict[str, Any]:
        """What else ``run.json`` says of this task; good to know, not compared."""
        return {}

    def text_files(self) -> list[str]:
        """Files whose features stand for the class texts."""
        return [self.text_features] if self.text_features else []

    def fingerprints(self) -> dict[str, str]:
        """Digests of the weights of all networks, by what ``run.json`` calls them."""
        return {"weights": self.backbone.fingerprint()}

    def networks(self) -> list[str]:
        """All networks that were loaded, and from where, in words."""
        given = self.config.attention
        recipe = given if isinstance(given, str) else f"{given.get('name')} with changes"
        return [f"{self.backbone.title}, {self.backbone.checkpoint.where}, attention {recipe}"]

    def words(self, info: DatasetInfo) -> list[str]:
        """The words whose features are the rows of ``texts``; one a class."""
        return list(info.prompts)

    def configure_texts(self) -> None:
        """Encode the class texts once, where no file gave their features."""
        words = self.words(self.info)
        if words and not self.text_features:
            self.texts = self.encode_texts(words)
        if self.texts is not None and self.text_features:
            self.check_features(self.text_features, self.texts.features)

    def encode_texts(self, words: Sequence[str]) -> Texts:
        """Features of words, on the CPU: rank 0 computes them on its device, the others get them."""
        strategy = self.trainer.strategy
        found: Any = None
        if self.trainer.is_global_zero:
            if strategy.root_device.type == "cuda":
                self.backbone.fingerprint()  # part of the cache's key; not of weights far away
                self.backbone.to(strategy.root_device)
            found = Texts.encode(self.backbone, words, self.prompt_templates).to("cpu")
            self.backbone.to("cpu")  # where all ranks have it until Lightning moves it
        texts: Texts = strategy.broadcast(found, src=0)
        return texts

    def check_features(self, path: str, features: Tensor) -> None:
        """Refuse features [T,C] from a file that are of another backbone.

        Raises:
            InvalidSetting: says so.
        """
        if features.shape[1] != self.backbone.embed_dim:
            raise InvalidSetting(
                f"{path} has features of {features.shape[1]} channels, but {self.config.model} has "
                f"{self.backbone.embed_dim}: they are of another backbone"
            )

    def pixels(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        """B images uint8 as normalised batches: a single one, or one an image where sizes differ."""
        batches = [image[None] for image in images] if isinstance(images, list) else [images]
        return [self.backbone.preprocess(batch) for batch in batches if len(batch)]

    def encode_images(self, images: Tensor | list[Tensor]) -> list[ImageTokens]:
        """Tokens of each of B images (of 1 each), which may differ in size."""
        texts = None if self.texts is None else self.texts.features
        encoded = [self.backbone.encode_image(batch, texts) for batch in self.pixels(images)]
        return [
            ImageTokens(class_token, patch_tokens, tokens.grid)
            for tokens in encoded
            for class_token, patch_tokens in zip(
                tokens.class_token.split(1), tokens.patch_tokens.split(1), strict=True
            )
        ]

    def explain_batches(
        self, images: Tensor | list[Tensor], methods: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[dict[str, Tensor]]:
        """Similarities of images with the class texts, by several methods.

        Args:
            images: uint8, which may differ in size.
            methods: name, see `surgery.explain` -> its options.

        Yields:
            Name -> [b,T,h,w], of all images at once, or of each where they differ in size.
        """
        assert self.texts is not None  # needs = ("classes",)
        for batch in self.pixels(images):
            with self.backbone.encoding_once(batch):
                maps = {
                    name: explain(self.backbone, batch, self.texts, name, **options)
                    for name, options in methods.items()
                }
            yield maps

    def new_measures(self) -> Measures:
        """Empty measures of this task on this data set."""
        return self.measured_by.of(self.info, self.settings())

    def on_predict_start(self) -> None:
        """Compare and measure where the tokens are; Apple's GPUs have no float64."""
        self.texts = self.texts and self.texts.to(self.device)
        on_host = self.measures_on_host or self.device.type == "mps"
        self.measures.to(torch.device("cpu") if on_host else self.device)


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
    classes = (getattr(import_module(f"tasks.{module}"), cls) for module, cls in TASKS.items())
    return sorted(task.__name__ for task in classes if has.issuperset(task.needs))


def fitting_datasets(needs: tuple[str, ...]) -> list[str]:
    """DataModules that have all that a task needs."""
    classes = (getattr(datamodules, cls) for cls in DATASETS.values())
    return sorted(cls.__name__ for cls in classes if offers(cls.info).issuperset(needs))
