"""Multi-label recognition: which classes are in the image (mAP of Tables 3 and 6 of the paper)?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import InvalidSetting
from datamodules._datamodule import ShardDataModule
from datamodules._samples import Batch
from surgery import ImageTokens, similarity
from surgery.devices import send
from surgery.features import merged_predictions, prediction_surgery
from tasks._task import DEFAULT_BACKBONE, BackboneConfig, Task
from tasks._text_features import read_text_features
from tasks._transfer import Copy, Later
from tasks.measures._measures import other_reading
from tasks.measures.recognition import RecognitionMeasures
from tasks.run.image import ImageResult
from tasks.run.results import Facts, Scores


class Recognition(Task):
    """Which classes does the image show? Scores of all classes, and mAP.

    The class token of CLIP's own path is compared with the class texts and scored four ways: CLIP's
    softmax over classes at its logit scale, the plain cosine, and both forms of feature surgery (Eq.
    8-11, the class token c in place of patch tokens).

    mAP ranks the images of one class, so it only sees what a way does *between* images. The cosine
    s = c.t of an image has a part that all its texts share, larger for some images than for others,
    which puts those images first in every class. Feature surgery takes it away:

    - ``paper``: s_t - m, with m = mean_t(w_t s_t) the same for all classes of an image. Classes keep
      their order and distances within the image; only whole images move against each other: the
      paper's "adjusts scores across images", exactly and alone.
    - ``code`` (as released): w_t s_t - m. As w grows with s, the classes of an image are stretched
      too: near the mean it is about (1 + tau s)(s_t - m) instead. Classes still keep their order
      where cosines are above -1/tau (always, with CLIP), but their distances now depend on the
      image, so the ranking of images differs from that of the equations.

    The softmax also compares within the image, but exponentially: classes of one image share a sum
    of 1, so an image that shows many things is put behind one that shows a single thing.

    ``mAP`` is that of ``form``, as of `Explainability`'s ``feature_surgery``; ``mAP_paper`` (or
    ``mAP_code``) that of the other form, ``mAP_softmax`` and ``mAP_cosine`` those of the others.

    Each output shard has the scores as ``__shard__/scores.parquet`` (``form``), ``scores_paper.parquet``
    (the other form), ``scores_softmax.parquet`` and ``scores_cosine.parquet``: the column ``key``, and
    one float32 column a class.

    TaI-DPT and "TaI-DPT + ours" of Table 6: its two sets of learned prompts as ``text_features`` and
    ``local_text_features``, with ``--model.backbone.attention tai_dpt``. ``cosine`` is then its merged
    prediction, and feature surgery is applied to that (the paper gives no formula for it).

    Args:
        backbone: which CLIP, and how it is read.
        form: ``code`` as released, or ``paper`` by Eq. 8-11; see above.
        tau: temperature of the class weights in feature surgery.
        text_features: features of the class texts from a file, see `Task`.
        local_text_features: a second file of such features, for places; see above.
    """

    needs = ("classes", "positives")

    measured_by = RecognitionMeasures
    measures: RecognitionMeasures

    local_text: Tensor | None = None
    """[T,C] unit features that places are compared with."""

    def __init__(
        self,
        backbone: BackboneConfig = DEFAULT_BACKBONE,
        form: Literal["code", "paper"] = "code",
        tau: float = 2.0,
        text_features: str | None = None,
        local_text_features: str | None = None,
    ) -> None:
        super().__init__(backbone, text_features)
        if local_text_features and not text_features:
            raise InvalidSetting(
                "--model.local_text_features stands beside --model.text_features: give both"
            )
        self.form: Any = form
        self.tau = tau
        self.local_text_features = local_text_features

    def check_data(self, datamodule: ShardDataModule) -> None:
        """Refuse a single class: it has nothing in common with others."""
        super().check_data(datamodule)
        if len(datamodule.info.classes) < 2:
            raise InvalidSetting("Recognition compares classes: it needs a data set of two or more")

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Sequence[ImageResult]:
        """Scores of all classes, each way, for each image."""
        if not batch.samples:
            return []
        scores = self.score(self.predictions(self.encode_images(batch.images)))
        known = [i for i, sample in enumerate(batch.samples) if sample.positives is not None]
        truth = torch.zeros(len(batch.samples), len(self.info.classes), dtype=torch.bool)
        for i in known:
            truth[i, list(batch.samples[i].positives or ())] = True
        labelled = scores
        if len(known) < len(truth):
            rows = send(torch.tensor(known, dtype=torch.int64), self.device)
            labelled = {way: values[rows] for way, values in scores.items()}
        self.measures.update(labelled, send(truth[known], self.device))
        copy = Copy([values.float() for values in scores.values()])
        keys = [sample.key for sample in batch.samples]

        def make() -> list[ImageResult]:
            written = dict(zip(scores, copy.arrays(), strict=True))
            return [
                self._result(key, {way: values[i] for way, values in written.items()}, truth[i])
                for i, key in enumerate(keys)
            ]

        return Later(len(keys), make)

    def text_files(self) -> list[str]:
        """Those of the class texts, and those for places."""
        return [*super().text_files(), *filter(None, [self.local_text_features])]

    def configure_texts(self) -> None:
        """Features of the class texts, and those for places."""
        super().configure_texts()
        self.logit_scale = self.backbone.logit_scale  # read once: a GPU would be waited for
        if self.local_text_features:
            aliases = dict(zip(self.info.prompts, self.info.classes, strict=True))
            features = read_text_features(self.local_text_features, self.words(self.info), aliases)
            self.check_features(self.local_text_features, features)
            self.local_text = features

    def predictions(self, tokens: list[ImageTokens]) -> Tensor:
        """What is ranked, [B,K]: cosines with the class token, or TaI-DPT's merged predictions."""
        assert self.texts is not None  # needs = ("classes", ...)
        text = self.texts.features
        if self.local_text is None:
            class_tokens = torch.cat([image.class_token for image in tokens])
            return similarity(class_tokens[:, None], text)[:, 0]
        local = self.local_text.to(self.device)
        merged = [
            merged_predictions(image.patch_tokens, image.class_token, text, local)
            for image in tokens
        ]
        return torch.cat(merged)

    def score(self, predictions: Tensor) -> dict[str, Tensor]:
        """Way of scoring -> scores [B,K]; the first one, "", is the task's own."""
        other = other_reading(self.form)
        return {
            "": prediction_surgery(predictions, tau=self.tau, form=self.form),
            other: prediction_surgery(predictions, tau=self.tau, form=other),
            "softmax": (self.logit_scale * predictions).softmax(dim=1),
            "cosine": predictions,
        }

    def _result(self, key: str, scores: dict[str, np.ndarray], truth: Tensor) -> ImageResult:
        names = self.info.classes
        best = scores[""].argsort(kind="stable")[::-1][:5]
        facts = {
            "labels": [names[i] for i in truth.nonzero()[:, 0].tolist()],
            "best": {names[i]: round(float(scores[""][i]), 6) for i in best},
        }
        return ImageResult(key, (Facts(facts), Scores(names, scores)))
