"""Recipes from the command line: their fields, and class texts for those that need them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datamodules import Shapes
from surgery import RECIPES, Texts, load_backbone, similarity
from surgery.adapted import adapted_scores, text_clusters
from surgery.clusters import cluster_cells, correlations, one_label_a_cluster
from surgery.fused import fused_labels, fused_scores, read_layers, read_parts
from surgery.windows import cut_windows
from tasks.__main__ import main
from tests.tasks.test_segmentation import label_maps, pictured

OURS = (
    "--model.backbone.attention.name=resclip",
    "--model.backbone.attention.attention_blocks=[2,5]",
)


def test_a_recipe_with_fields_of_its_own_reads_the_class_texts(predict, scenes, tiny, tmp_path):
    run = predict(tmp_path / "run", *OURS, "--model.feature_surgery=none", "--writer.layout=files")
    recipe = replace(RECIPES["resclip"], attention_blocks=(2, 5))
    backbone = load_backbone(tiny, attention=recipe)
    texts = Texts.encode(backbone, Shapes.info.prompts).features
    image = backbone.preprocess(pictured(scenes, "00000007", 48))
    tokens = backbone.encode_image(image, texts=texts)
    expected = similarity(tokens.patch_tokens, texts)[0].T.unflatten(1, tokens.grid)
    (stored,) = run.rglob("00000007.surgery.scores.npy")
    found = torch.from_numpy(np.load(stored)).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    plain = backbone.with_attention("naclip").encode_image(image)
    assert (
        similarity(plain.patch_tokens, texts)[0].T.flatten() - found.flatten()
    ).abs().max() > 0.01


@pytest.mark.parametrize("window", [None, 32])
def test_the_score_of_cliper(window, predict, scenes, tiny, tmp_path):
    run = predict(
        tmp_path / "run",
        *(
            "--model.backbone.attention=cliper",
            "--model.score=fused",
            "--model.background=[sky, grass]",
        ),
        *("--model.prob_thd=0.4", "--model.class_thd=0.05", "--model.logit_scale=50"),
        *([f"--model.window={window}", "--model.stride=16"] if window else []),
        task="Segmentation",
    )
    stored = label_maps(run)["00000007"]
    backbone = load_backbone(tiny)
    words = [*Shapes.info.prompts, "sky", "grass"]
    texts = Texts.encode(backbone, words).features
    image = backbone.preprocess(pictured(scenes, "00000007", 48))
    foreground = torch.arange(len(words)) < len(Shapes.info.prompts)
    parts = read_parts(backbone, image, cut_windows((48, 48), window, 16) if window else [])
    assert len(parts) == (4 if window else 0)
    scores = fused_scores(
        read_layers(backbone, image), texts, foreground, scale=50.0, threshold=0.2, parts=parts
    )
    expected = fused_labels(scores, stored.shape, background=0.4, least=0.05)[0]
    assert (stored == expected.numpy()).mean() > 0.999
    assert len(np.unique(stored)) > 2


def test_the_clusters_of_cliptrase(predict, scenes, tiny, tmp_path):
    attention = "--model.backbone.attention=cliptrase"
    plain, run = (
        predict(tmp_path / name, attention, *words, task="Segmentation")
        for name, words in (("plain", ()), ("run", ["--model.cluster_eps=0.5"]))
    )
    key = "00000007"
    before, after = (torch.from_numpy(label_maps(one)[key]).long() for one in (plain, run))
    backbone = load_backbone(tiny, attention="cliptrase")
    image = backbone.preprocess(pictured(scenes, key, 48))
    (correlation,) = correlations(backbone, image)
    clusters = cluster_cells(correlation, 0.5)
    assert clusters.max() >= 0
    assert torch.equal(one_label_a_cluster(before, correlation, clusters, (6, 6)), after)


def test_the_score_of_rf_clip_in_windows(predict, scenes, tiny, tmp_path):
    recipe = replace(RECIPES["rf_clip"], sink_channels=(3, 40), sink_factor=3.0)
    run = predict(
        tmp_path / "run",
        *("--model.backbone.attention.name=rf_clip", "--model.backbone.attention.sink_factor=3.0"),
        *("--model.backbone.attention.sink_channels=[3,40]", "--model.score=adapted"),
        *("--model.window=32", "--model.stride=16"),
        task="Segmentation",
    )
    stored = label_maps(run)["00000007"]
    backbone = load_backbone(tiny, attention=recipe)
    texts = Texts.encode(backbone, Shapes.info.prompts).features
    image = backbone.preprocess(pictured(scenes, "00000007", 48))
    whole = similarity(backbone.encode_image(image).class_token[:, None], texts)[:, 0]
    canvas, counts = torch.zeros(len(texts), 48, 48), torch.zeros(48, 48)
    for y in (0, 16):
        for x in (0, 16):
            part = (..., slice(y, y + 32), slice(x, x + 32))
            tokens = backbone.encode_image(image[part])
            scores = adapted_scores(tokens.patch_tokens, whole, texts, text_clusters(texts))
            scores = scores.transpose(1, 2).unflatten(2, tokens.grid)
            canvas[part] += F.interpolate(scores, scale_factor=8, mode="bilinear")[0]
            counts[part] += 1
    large = F.interpolate((canvas / counts)[None], size=stored.shape, mode="bilinear")[0]
    assert (stored == large.argmax(0).numpy() + 1).mean() > 0.999


@pytest.mark.parametrize(
    ("task", "words", "said"),
    [
        ("Segmentation", ["--model.backbone.attention=rf_clip"], "sink_channels"),
        ("Segmentation", ["--model.backbone.attention=resclip"], "attention_blocks"),
        ("Segmentation", ["--model.backbone.attention=resklip"], "did you mean 'resclip'"),
        ("Segmentation", ["--model.backbone.attention.class_share=0.1"], "attention.name"),
        ("Segmentation", [*OURS, "--model.backbone.attention.share=1"], "no field 'share'"),
        ("Segmentation", [*OURS, "--model.backbone.attention.combine=mode"], "combine='mode'"),
        ("Segmentation", ["--model.score=fused"], "--model.backbone.attention cliper"),
        ("Segmentation", ["--model.cluster_eps=0.5", "--model.window=32"], "whole images"),
        ("Opinions", [*OURS], "class texts"),
    ],
)
def test_what_can_not_be(task, words, said, command, tmp_path, capsys):
    assert main(command(tmp_path / "run", *words, task=task)) == 1
    assert said in capsys.readouterr().err
