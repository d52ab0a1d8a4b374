"""Multi-label recognition: which classes are in the image, scored three ways (Tables 3 and 6)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import InvalidSetting
from datamodules.samples import Batch
from datamodules.shards import ShardDataModule
from surgery import feature_surgery, similarity
from tasks.base import DEFAULT_BACKBONE, BackboneConfig, Task
from tasks.measures.recognition import RecognitionMeasures
from tasks.run.results import Facts, ImageResult, Scores

WAYS = {"surgery": "", "softmax": "softmax", "cosine": "cosine"}
"""How each way of scoring is called in the results; the task's own has no name."""


class Recognition(Task):
    """Which classes does the image show? Scores of all classes, and mAP.

    The class token of CLIP's own path is compared with the class texts and scored three ways:
    CLIP's softmax over classes at its logit scale, the plain cosine, and feature surgery (Eq. 8-11,
    the class token c in place of patch tokens).

    mAP ranks the images of one class, so it only sees what a way does *between* images. The cosine
    s = c.t of an image has a part that all its texts share, larger for some images than for others,
    which puts those images first in every class. Feature surgery takes it away:

    - ``paper``: s_t - m, with m = mean_t(w_t s_t) the same for all classes of an image. Classes keep
      their order and distances within the image; only whole images move against each other. This is
      the paper's "adjusts scores across images", exactly and alone, and the default.
    - ``code`` (as released): w_t s_t - m. As w grows with s, the classes of an image are stretched
      too: near the mean it is about (1 + tau s)(s_t - m) instead. Classes still keep their order
      where cosines are above -1/tau (always, with CLIP), but their distances now depend on the
      image, so the ranking of images differs from that of the equations.

    The softmax also compares within the image, but exponentially: classes of one image share a sum
    of 1, so an image that shows many things is put behind one that shows a single thing.

    Each output shard has the scores as ``__shard__/scores.parquet`` (surgery), ``scores_softmax.parquet``
    and ``scores_cosine.parquet``: the column ``key``, and one float32 column a class.

    Args:
        backbone: which CLIP, and how it is read.
        form: ``paper`` by Eq. 8-11, or ``code`` as released; see above.
        tau: temperature of the class weights in feature surgery.
        text_features: features of the class texts from a file, see `Task`.
    """

    needs = ("classes", "positives")

    measured_by = RecognitionMeasures
    measures: RecognitionMeasures

    def __init__(
        self,
        backbone: BackboneConfig = DEFAULT_BACKBONE,
        form: Literal["paper", "code"] = "paper",
        tau: float = 2.0,
        text_features: str | None = None,
    ) -> None:
        super().__init__(backbone, text_features)
        self.form: Any = form
        self.tau = tau

    def check_data(self, datamodule: ShardDataModule) -> None:
        """Refuse a single class: it has nothing in common with others."""
        super().check_data(datamodule)
        if len(datamodule.info.classes) < 2:
            raise InvalidSetting("Recognition compares classes: it needs a data set of two or more")

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> list[ImageResult]:
        """Scores of all classes, three ways, for each image."""
        if not batch.keys:
            return []
        tokens = self.encode_images(batch.images)
        scores = self.score(torch.cat([image.class_token for image in tokens]))
        known = [i for i, positives in enumerate(batch.positives) if positives is not None]
        truth = torch.zeros(len(batch.keys), len(self.info.classes), dtype=torch.bool)
        for i in known:
            truth[i, list(batch.positives[i] or ())] = True
        truth = truth.to(self.device)
        labelled = {way: values[known] for way, values in scores.items()}
        self.measures.update(labelled, truth[known])
        written = {way: values.float().cpu().numpy() for way, values in scores.items()}
        return [
            self._result(key, {way: values[i] for way, values in written.items()}, truth[i])
            for i, key in enumerate(batch.keys)
        ]

    def score(self, class_token: Tensor) -> dict[str, Tensor]:
        """Scores [B,K] of images by their class tokens [B,C], each way."""
        assert self.text is not None  # needs = ("classes", ...)
        tokens = class_token[:, None]
        cosine = similarity(tokens, self.text)[:, 0]
        surgery = feature_surgery(tokens, class_token, self.text, tau=self.tau, form=self.form)
        return {
            "surgery": surgery[:, 0],
            "softmax": (self.backbone.logit_scale * cosine).softmax(dim=1),
            "cosine": cosine,
        }

    def _result(self, key: str, scores: dict[str, np.ndarray], truth: Tensor) -> ImageResult:
        names = self.info.classes
        best = scores["surgery"].argsort(kind="stable")[::-1][:5]
        facts = {
            "labels": [names[i] for i in truth.nonzero()[:, 0].tolist()],
            "best": {names[i]: round(float(scores["surgery"][i]), 6) for i in best},
        }
        ways = {WAYS[way]: values for way, values in scores.items()}
        return ImageResult(key, (Facts(facts), Scores(names, ways)))
