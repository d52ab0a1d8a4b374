"""Looks into CLIP, on small numbers done by hand and on the stored networks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from surgery.analysis import (
    BlockView,
    affinity,
    cells,
    foreground_selection,
    map_likeness,
    walk_blocks,
)
from surgery.metrics import ClassMean


def test_selection_by_hand():
    weights = torch.tensor(
        [
            [0.5, 0.1, 0.3, 0.1],
            [0.2, 0.6, 0.1, 0.1],
            [0.0, 0.0, 1.0, 0.0],
            [0.3, 0.3, 0.2, 0.2],
        ]
    )
    foreground = torch.tensor([[True, True, False, False], [False, False, True, False]])
    valid = torch.ones(2, 4, dtype=torch.bool)
    found = foreground_selection(weights, foreground, valid)
    others = (0.1 / 0.5 + 0.2 / 0.4) / 2
    torch.testing.assert_close(found[0], torch.tensor([(0.6 + 0.8) / 2, others, (0.5 + 1) / 2]))
    assert found[1].isnan().all()  # a single cell
    valid[0, 2] = False
    found = foreground_selection(weights, foreground, valid)
    expected = (0.6 / 0.7 + 0.8 / 0.9) / 2
    torch.testing.assert_close(found[0, 0], torch.tensor(expected))
    everything = torch.ones(1, 4, dtype=torch.bool)
    assert foreground_selection(weights, everything, everything).isnan().all()
    assert foreground_selection(weights, foreground[:0], valid[:0]).shape == (0, 3)


def test_blind_attention_scores_the_share_of_the_object():
    foreground = torch.zeros(1, 20, dtype=torch.bool)
    foreground[0, :5] = True
    found = foreground_selection(torch.ones(20, 20), foreground, torch.ones_like(foreground))
    assert found[0, 0] == pytest.approx(5 / 20)
    assert found[0, 1] == pytest.approx(4 / 19)


def test_cells_are_shares():
    mask = torch.zeros(1, 6, 4, dtype=torch.bool)
    mask[0, :4, 0] = True
    assert cells(mask, (2, 2)).tolist() == [pytest.approx([0.5, 0, 1 / 6, 0])]


def test_affinity_and_likeness():
    output = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, -1.0]])
    found = affinity(output, torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    assert found.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    rng = np.random.default_rng(0)
    maps, reference = rng.normal(size=(9, 3)), rng.normal(size=9)
    likeness = map_likeness(torch.from_numpy(maps), torch.from_numpy(reference)).numpy()
    scaled = (maps - maps.min(0)) / np.ptp(maps, axis=0)
    empty = (reference - reference.min()) / np.ptp(reference)
    for i in range(3):
        cosine = scaled[:, i] @ empty / np.linalg.norm(scaled[:, i]) / np.linalg.norm(empty)
        correlation = np.corrcoef(maps[:, i], reference)[0, 1]
        assert likeness[i].tolist() == pytest.approx([cosine, correlation])
    assert map_likeness(torch.zeros(4, 1), torch.arange(4.0)).tolist() == [[0.0, 0.0]]


def test_blocks_are_those_of_plain_clip(network):
    """The last block's attention and every output against open_clip's own modules."""
    backbone = network("vit", attention="raw")
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    visual = backbone.model.visual
    seen: dict[str, list[torch.Tensor]] = {"attention": [], "ffn": [], "raw": []}
    hooks = []
    for block in visual.transformer.resblocks:

        def attend(module, arguments, keywords, output):
            seen["attention"].append(output[0])
            own = torch.nn.MultiheadAttention.forward
            x = keywords.get("query", arguments[0] if arguments else None)
            seen["raw"].append(own(module, x, x, x, average_attn_weights=True)[1])

        hooks.append(block.attn.register_forward_hook(attend, with_kwargs=True))
        hooks.append(
            block.mlp.register_forward_hook(lambda m, a, output: seen["ffn"].append(output))
        )
    visual(images)
    for hook in hooks:
        hook.remove()
    views: list[BlockView] = []
    walk_blocks(backbone, images, views.append)
    assert len(views) == len(visual.transformer.resblocks) == 12
    for i, view in enumerate(views):
        assert view.grid == (6, 6)
        torch.testing.assert_close(view.weights["raw"], seen["raw"][i], atol=1e-5, rtol=1e-4)
        total = view.weights["consistent"].sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))
        for module in ("attention", "ffn"):
            projected = F.layer_norm(
                seen[module][i],
                visual.ln_post.normalized_shape,
                visual.ln_post.weight,
                visual.ln_post.bias,
            )
            projected = projected @ visual.proj
            torch.testing.assert_close(view.outputs[module], projected, atol=1e-4, rtol=1e-3)


def test_a_resnet_is_refused(network):
    with pytest.raises(ValueError, match="ResNet"):
        walk_blocks(network("rn"), torch.zeros(1, 3, 96, 96), print)


def test_class_means_merge_and_leave_gaps_out():
    whole, parts = ClassMean(4, dims=1), [ClassMean(4, dims=1), ClassMean(4, dims=1)]
    values = [[[1.0, 3.0], [5.0, 7.0]], [[2.0, torch.nan], [9.0, 1.0]], [[4.0, 4.0]]]
    classes = [[0, 2], [0, 1], [0]]
    for i, (rows, where) in enumerate(zip(values, classes, strict=True)):
        for metric in (whole, parts[i % 2]):
            metric.update(torch.tensor(rows), torch.tensor(where))
    merged = ClassMean(4, dims=1)
    for part in [*parts, ClassMean(4, dims=1)]:
        merged.merge_state(part.metric_state)
    expected = torch.tensor([[2.5, 3.5], [9.0, 1.0], [5.0, 7.0]], dtype=torch.float64)
    assert torch.equal(merged.per_class()[:3], expected)
    assert merged.per_class()[3].isnan().all()
    assert torch.equal(merged.mean(), whole.mean())
    assert torch.equal(whole.compute(), expected.mean(0))
