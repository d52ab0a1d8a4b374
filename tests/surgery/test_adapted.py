"""RF-CLIP's score, against the numbers of its own code."""

import pytest
import torch

from surgery import similarity
from surgery.adapted import adapted_scores, adapted_texts, text_clusters
from tests.surgery.recipes import OURS


@pytest.fixture(scope="module")
def backbone(network):
    return network("vit", attention=OURS["rf_clip"])


def seen(backbone, images, texts):
    """Tokens, and the class token's cosines with texts."""
    tokens = backbone.encode_image(images)
    return tokens, similarity(tokens.class_token[:, None], texts)[:, 0]


def on_grid(scores, grid):
    return scores.transpose(1, 2).unflatten(2, grid)


def test_texts_that_are_alike(reference, texts):
    found, stored = text_clusters(texts), reference("rf_clip")["rf_clip_text_clusters"]
    # Which number a group has says nothing.
    assert torch.equal(found[:, None] == found, stored[:, None] == stored)
    assert text_clusters(texts[:1]).tolist() == [0]


def test_texts_of_an_image_and_its_scores(backbone, reference, texts):
    expected = reference("rf_clip")
    tokens, whole = seen(backbone, reference("inputs")["images_vit"], texts)
    groups = text_clusters(texts)
    moved = adapted_texts(tokens.patch_tokens, whole, texts, groups)
    torch.testing.assert_close(moved, expected["rf_clip_texts"], rtol=0, atol=5e-6)
    scores = on_grid(adapted_scores(tokens.patch_tokens, whole, texts, groups), tokens.grid)
    torch.testing.assert_close(scores, expected["rf_clip_logits"], rtol=0, atol=5e-6)


def test_a_window_of_an_image(backbone, reference, texts):
    image = reference("inputs")["images_vit_large"][:1]
    _, whole = seen(backbone, image, texts)
    tokens = backbone.encode_image(image[..., :96, :96])
    scores = adapted_scores(tokens.patch_tokens, whole, texts, text_clusters(texts))
    stored = reference("rf_clip")["rf_clip_logits_crop_of_large_image0"]
    torch.testing.assert_close(on_grid(scores, tokens.grid), stored, rtol=0, atol=5e-6)
