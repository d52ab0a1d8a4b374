"""CLIPtrase's clusters, against the numbers of its own code."""

import pytest
import torch
import torch.nn.functional as F

from common.errors import InvalidSetting
from surgery import similarity
from surgery.clusters import NOISE, cluster_cells, correlations, one_label_a_cluster


def test_regions_of_one_label(reference, network, texts):
    expected, images = reference("cliptrase"), reference("inputs")["images_vit"]
    backbone = network("vit", attention="cliptrase", class_token="released")
    found = correlations(backbone, images)
    torch.testing.assert_close(found, expected["cliptrase_correlation"], rtol=0, atol=5e-6)
    tokens = backbone.encode_image(images)
    cosines = similarity(tokens.patch_tokens, texts).transpose(1, 2).unflatten(2, tokens.grid)
    logits = backbone.logit_scale * F.interpolate(cosines, size=(96, 96), mode="bilinear")
    labels = logits.argmax(dim=1)
    assert torch.equal(labels, expected["cliptrase_prediction_unclustered"].long())
    # Where its code has VOC20, the class token's logit weighs each text's.
    weights = backbone.logit_scale * similarity(tokens.class_token[:, None], texts)[:, 0]
    weighted = (logits * weights[:, :, None, None]).argmax(dim=1)
    eps, least = expected["cliptrase_dbscan"].tolist()
    for i in range(3):
        clusters = cluster_cells(found[i], eps, int(least))
        assert torch.equal(clusters, expected["cliptrase_clusters"][i])
        for given, stored in ((labels, ""), (weighted, "_voc20")):
            regions = one_label_a_cluster(given[i], found[i], clusters, tokens.grid)
            assert torch.equal(regions, expected[f"cliptrase_prediction{stored}"][i].long())


def test_clusters_of_points():
    rows = torch.tensor([[9.0], [0.0], [0.1], [0.2], [0.35], [5.0], [5.1], [5.2]])
    found = cluster_cells(rows, 0.16)
    assert found.tolist() == [NOISE, 0, 0, 0, 0, 1, 1, 1]
    labels = torch.zeros(2, 2, dtype=torch.int64)
    nothing = torch.full((4,), NOISE)
    assert torch.equal(one_label_a_cluster(labels, torch.eye(4), nothing, (2, 2)), labels)


def test_a_resnet_has_no_block_before_the_last(reference, network):
    with pytest.raises(InvalidSetting, match="ViT"):
        correlations(network("rn"), reference("inputs")["images_rn"])
