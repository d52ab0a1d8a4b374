"""Gradient and relevance methods, against their own repositories' numbers."""

import pytest
import torch

from common.errors import InvalidSetting
from surgery import METHODS, Texts, explain, load_backbone
from surgery.methods import _gradients

BEYOND = [name for name, method in METHODS.items() if not method.cosines]
ON_RESNETS = ("grad_cam", "gscorecam")
CASES = {
    # array: method, options, how far off float32 may be
    "gradcam_vit_signed": ("grad_cam", {}, 1e-6),
    "gradcam_rn_signed": ("grad_cam", {}, 5e-5),
    "gscorecam_vit_signed": ("gscorecam", {"channels": 50}, 1e-4),
    "gscorecam_rn_signed": ("gscorecam", {}, 1e-4),
    "bimodal_last_block_vit": ("bi_modal", {}, 1e-5),
    "bimodal_all_blocks_vit": ("bi_modal", {"blocks": None}, 1e-5),
    "legrad_vit_raw": ("legrad", {}, 1e-8),
    "legrad_vit_raw_last5": ("legrad", {"blocks": 5}, 1e-8),
    "gradeclip_vit": ("grad_eclip", {}, 1e-6),
    "gradeclip_vit_last3": ("grad_eclip", {"blocks": 3}, 1e-6),
    "gradeclip_vit_projected": ("grad_eclip", {"nearness": "projected"}, 1e-6),
    "gradeclip_vit_no_similarity": ("grad_eclip", {"nearness": "none"}, 1e-6),
}


@pytest.fixture
def inputs(reference):
    """Two images of a kind, three texts."""

    def of(kind):
        images = reference("inputs")[f"images_{kind}"][:2]
        return images, Texts(reference(kind)["text_features"][:3])

    return of


@pytest.mark.parametrize("name", CASES)
def test_as_in_its_repository(name, inputs, reference, network):
    method, options, atol = CASES[name]
    kind = "rn" if "_rn" in name else "vit"
    found = explain(network(kind), *inputs(kind), method=method, **options)
    torch.testing.assert_close(found, reference("explainers")[name], rtol=0, atol=atol)


def test_partial_lrp_in_64_bits(inputs, reference, folder):
    backbone = load_backbone(folder / "vit.json", folder / "vit.safetensors").double()
    images, texts = inputs("vit")
    found = explain(backbone, images.double(), texts.features.double(), method="plrp")
    expected = reference("explainers")["lrp_last_block_vit"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", BEYOND)
def test_inside_of_predict_under_autocast(method, inputs, network):
    images, texts = inputs("vit")
    options = {"channels": 20} if method == "gscorecam" else {}
    expected = explain(network("vit"), images, texts, method=method, **options)
    assert not expected.requires_grad
    assert expected.abs().max() > 0
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        own = Texts(texts.features.clone())
        found = explain(network("vit"), images.clone(), own, method=method, **options)
    assert torch.equal(found, expected)


HALF = [*((method, "vit") for method in BEYOND), *((method, "rn") for method in ON_RESNETS)]


@pytest.mark.parametrize(("method", "kind"), HALF)
def test_weights_of_16_bits(method, kind, inputs, folder, network):
    backbone = load_backbone(folder / f"{kind}.json", folder / f"{kind}.safetensors").bfloat16()
    images, texts = inputs(kind)
    options = {"channels": 20} if method == "gscorecam" else {}
    found = explain(backbone, images, texts, method=method, **options).float()
    expected = explain(network(kind), images, texts, method=method, **options)
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("method", BEYOND)
def test_grids_that_are_not_square(method, inputs, network):
    images, texts = inputs("vit")
    wide = torch.cat([images, images[..., :32]], dim=3)
    options = {"channels": 20} if method == "gscorecam" else {}
    found = explain(network("vit"), wide, texts, method=method, **options)
    assert found.shape == (2, 3, 6, 8)
    assert found.isfinite().all()
    assert (found.amax((2, 3)) > found.amin((2, 3))).all()


@pytest.mark.parametrize("method", BEYOND)
def test_a_text_has_its_map_whatever_else_is_asked_for(method, inputs, network, monkeypatch):
    images, texts = inputs("vit")
    options = {"channels": 20} if method == "gscorecam" else {}
    options |= {"blocks": 3} if method in ("bi_modal", "legrad", "grad_eclip") else {}
    together = explain(network("vit"), images, texts, method=method, **options)
    monkeypatch.setattr(_gradients, "_NUMBERS_AT_ONCE", 1)
    one_by_one = explain(network("vit"), images, texts, method=method, **options)
    alone = explain(network("vit"), images, texts[1:2], method=method, **options)
    size = together.abs().max().item()
    torch.testing.assert_close(one_by_one, together, rtol=0, atol=2e-5 * size)
    torch.testing.assert_close(alone, together[:, 1:2], rtol=0, atol=2e-5 * size)


@pytest.mark.parametrize("method", [m for m in BEYOND if m not in ON_RESNETS])
def test_resnets_are_refused_where_it_is_not_defined(method, inputs, network):
    with pytest.raises(InvalidSetting, match=rf"'{method}' is defined for a ViT.* is a ResNet"):
        explain(network("rn"), *inputs("rn"), method=method)


@pytest.mark.parametrize("method", ON_RESNETS)
def test_resnets_with_other_sizes_and_more_texts(method, reference, network):
    images = reference("inputs")["images_rn_large"][:, :, :96]
    texts = Texts(reference("rn")["text_features"])
    options = {"channels": 20} if method == "gscorecam" else {}
    found = explain(network("rn"), images, texts, method=method, **options)
    assert found.shape == (3, 9, 3, 5)
    alone = explain(network("rn"), images[2:], texts[4:5], method=method, **options)
    torch.testing.assert_close(alone, found[2:, 4:5], rtol=0, atol=1e-4)


def test_options_that_make_no_sense(inputs, network):
    for method, option in (("bi_modal", "blocks"), ("legrad", "blocks"), ("gscorecam", "channels")):
        with pytest.raises(InvalidSetting, match=f"{option}=0"):
            explain(network("vit"), *inputs("vit"), method=method, **{option: 0})


def test_grad_eclip_with_the_networks_own_heads(inputs, network):
    images, texts = inputs("vit")
    released = explain(network("vit"), images, texts, method="grad_eclip")
    mended = explain(network("vit"), images, texts, method="grad_eclip", heads="own")
    assert 1e-4 < (released - mended).abs().max() < 1e-2


def test_images_that_do_not_fit_are_taken_in_halves(inputs, network, monkeypatch):
    """Only gradients' own limit is lowered: encoding goes on with whole batches."""
    images, texts = inputs("vit")
    backbone = network("vit").with_attention("surgery")
    backbone.graph_batches = type(backbone.graph_batches)()
    expected = explain(backbone, images, texts, method="legrad")
    walk, sizes = type(backbone).walk, []

    def small(self, images, *rest, **more):
        sizes.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError
        return walk(self, images, *rest, **more)

    monkeypatch.setattr(type(backbone), "walk", small)
    found = explain(backbone, images, texts, method="legrad")
    assert sizes == [2, 1, 1]
    assert backbone.batches.limit is None
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
