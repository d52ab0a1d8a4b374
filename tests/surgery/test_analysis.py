"""Looks into CLIP, against the paper's analyses in plain numpy and open_clip's own modules."""

import numpy as np
import pytest
import torch

from surgery import analysis
from surgery.analysis import (
    affinity,
    cells,
    foreground_selection,
    look_inside,
    map_distance,
    map_likeness,
    strongest,
)
from surgery.batches import Batches
from surgery.metrics import ClassMean, ImageMean, Survival
from tests import reference_analyses as paper


def test_cells_are_exact_shares_where_the_grid_does_not_divide_the_image():
    rng = np.random.default_rng(0)
    masks = rng.random((3, 37, 50)) > 0.6
    found = cells(torch.from_numpy(masks), (4, 7)).numpy()
    for mask, shares in zip(masks, found, strict=True):
        np.testing.assert_allclose(shares, paper.cell_shares(mask, (4, 7)), atol=1e-6)
        assert shares.mean() == pytest.approx(mask.mean(), abs=1e-6)


def test_selection_is_that_of_the_token_at_the_highest_score():
    rng = np.random.default_rng(1)
    weights = rng.random((1 + 12, 1 + 12)) ** 3
    weights /= weights.sum(1, keepdims=True)
    scores, shares = rng.normal(size=(12, 3)), rng.random((3, 12))
    shares[2] = 0.0  # an object that is nowhere still counts, as 0
    asking = strongest(torch.from_numpy(scores))
    found = foreground_selection(torch.from_numpy(weights), asking, torch.from_numpy(shares))
    expected = [paper.fsr(weights, scores[:, p], shares[p]) for p in range(3)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert expected[2] == 0.0


def test_blind_attention_scores_the_share_of_the_object():
    foreground = torch.zeros(1, 20)
    foreground[0, :5] = 1.0
    found = foreground_selection(torch.ones(21, 21), torch.tensor([3]), foreground)
    assert found.tolist() == [5 / 20]


def test_affinity_is_the_mean_cosine_with_an_images_texts():
    rng = np.random.default_rng(2)
    features, texts = rng.normal(size=(2, 5, 8)), rng.normal(size=(3, 8))
    found = affinity(torch.from_numpy(features), torch.from_numpy(texts)).numpy()
    assert found.shape == (2, 5)
    for i in np.ndindex(2, 5):
        assert found[i] == pytest.approx(paper.affinity(features[i], texts))
    assert affinity(torch.from_numpy(features), torch.zeros(0, 8).double()).isnan().all()


def test_distance_and_likeness_to_the_empty_text():
    rng = np.random.default_rng(3)
    maps = np.stack([paper.min_max(rng.normal(size=(6, 5))) for _ in range(4)])
    found = map_distance(torch.from_numpy(maps[:3]), torch.from_numpy(maps[3])).numpy()
    for i in range(3):
        assert found[i].tolist() == pytest.approx(
            [paper.l1(maps[i], maps[3]), paper.l1(maps[i], 0.0)]
        )
    columns, reference = maps[:3].reshape(3, -1).T, maps[3].ravel()
    likeness = map_likeness(torch.from_numpy(columns), torch.from_numpy(reference)).numpy()
    for i in range(3):
        one = columns[:, i]
        cosine = one @ reference / np.linalg.norm(one) / np.linalg.norm(reference)
        correlation = np.corrcoef(one, reference)[0, 1]
        assert likeness[i].tolist() == pytest.approx([cosine, correlation])
    assert map_likeness(torch.zeros(4, 1), torch.arange(4.0)).tolist() == [[0.0, 0.0]]


def test_what_is_seen_is_plain_clips(network):
    """The last block's attention and every output against open_clip's own modules."""
    backbone = network("vit", attention="surgery")
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    visual = backbone.model.visual
    outputs: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []

    def attend(module, arguments, keywords, output):
        outputs.append(output[0])
        own = torch.nn.MultiheadAttention.forward
        x = keywords.get("query", arguments[0] if arguments else None)
        weights.append(own(module, x, x, x, average_attn_weights=True)[1])

    hooks = []
    for block in visual.transformer.resblocks:
        hooks.append(block.attn.register_forward_hook(attend, with_kwargs=True))
        hooks.append(block.mlp.register_forward_hook(lambda m, a, output: outputs.append(output)))
    visual(images)
    for hook in hooks:
        hook.remove()
    inside = look_inside(backbone, images)
    torch.testing.assert_close(inside.attention["raw"], weights[-1], atol=1e-5, rtol=1e-4)
    total = inside.attention["consistent"].sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    tokens = torch.stack([output[:, 0] for output in outputs], dim=1)  # [B, 2 * blocks, D]
    assert inside.modules.shape == (2, 12, 2, 64)
    for given, expected in (
        (inside.modules, tokens @ visual.proj),
        (inside.normed_modules, visual.ln_post(tokens) @ visual.proj),
    ):
        torch.testing.assert_close(given.flatten(1, 2), expected, atol=1e-4, rtol=1e-3)
    plain = network("vit", attention="raw").encode_image(images)
    torch.testing.assert_close(inside.tokens.class_token, plain.class_token, atol=1e-5, rtol=0)
    torch.testing.assert_close(inside.tokens.patch_tokens, plain.patch_tokens, atol=2e-5, rtol=0)
    assert inside.tokens.grid == (6, 6)


def test_consistent_attention_is_that_of_the_values(network):
    backbone = network("vit")
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    visual, read = backbone.model.visual, []
    last = visual.transformer.resblocks[-1]
    hook = last.ln_1.register_forward_hook(lambda m, a, output: read.append(output))
    visual(images)
    hook.remove()
    width = read[0].shape[-1]
    v = read[0] @ last.attn.in_proj_weight[2 * width :].T + last.attn.in_proj_bias[2 * width :]
    v = v.unflatten(-1, (last.attn.num_heads, -1)).transpose(1, 2)
    expected = (v @ v.transpose(-2, -1) * v.shape[-1] ** -0.5).softmax(-1).mean(1)
    found = look_inside(backbone, images).attention["consistent"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_images_too_many_for_the_memory_are_looked_into_in_halves(network, monkeypatch):
    backbone, images = network("vit"), torch.randn(3, 3, 96, 96)
    whole, attend = look_inside(backbone, images), analysis._mean_attention

    def small_only(queries, keys):
        if len(queries) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return attend(queries, keys)

    monkeypatch.setattr(analysis, "_mean_attention", small_only)
    monkeypatch.setattr(backbone, "graph_batches", Batches())  # others use this network too
    found = look_inside(backbone, images)
    torch.testing.assert_close(found.attention, whole.attention, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.normed_modules, whole.normed_modules, atol=1e-4, rtol=1e-3)


def test_a_resnet_is_refused(network):
    with pytest.raises(ValueError, match="ResNet"):
        look_inside(network("rn"), torch.zeros(1, 3, 96, 96))


def test_class_means_merge():
    whole, parts = ClassMean(4, dims=1), [ClassMean(4, dims=1), ClassMean(4, dims=1)]
    values = [[[1.0, 3.0], [5.0, 7.0]], [[3.0, 4.0], [9.0, 1.0]], [[4.0, 4.0]]]
    classes = [[0, 2], [0, 1], [0]]
    for i, (rows, where) in enumerate(zip(values, classes, strict=True)):
        for metric in (whole, parts[i % 2]):
            metric.update(torch.tensor(rows), torch.tensor(where))
    merged = ClassMean(4, dims=1)
    for part in [*parts, ClassMean(4, dims=1)]:
        merged.merge_state(part.metric_state)
    expected = torch.tensor([[8 / 3, 11 / 3], [9.0, 1.0], [5.0, 7.0]], dtype=torch.float64)
    torch.testing.assert_close(merged.per_class()[:3], expected)
    assert merged.per_class()[3].isnan().all()
    assert torch.equal(merged.mean(), whole.mean())
    torch.testing.assert_close(whole.compute(), expected.mean(0))
    over = torch.tensor([22 / 5, 19 / 5], dtype=torch.float64)
    torch.testing.assert_close(merged.over_samples(), over)


def test_image_means_and_survival_merge():
    means, curves = [ImageMean(1), ImageMean(1)], [Survival(2), Survival(2)]
    rng = np.random.default_rng(4)
    values = rng.random((9, 2))
    for i in range(9):
        row = torch.from_numpy(values[i]).clone()
        if i == 4:
            row[1] = torch.nan
        means[i % 2].update(row)
        curves[i % 2].update(torch.from_numpy(values[i : i + 1]))
    mean, curve = ImageMean(1), Survival(2)
    for i in range(2):
        mean.merge_state(means[i].metric_state)
        curve.merge_state(curves[i].metric_state)
    assert mean.mean().tolist() == pytest.approx(
        [values[:, 0].mean(), np.delete(values[:, 1], 4).mean()]
    )
    for k in range(2):
        samples = [(0, value) for value in values[:, k]]
        expected = paper.survival(samples, curve.thresholds().numpy())
        np.testing.assert_allclose(curve.curves()[k].numpy(), expected)
