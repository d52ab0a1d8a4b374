"""Methods behind one door, and one that is added to them."""

import pytest
import torch

from surgery import METHODS, Texts, explain, feature_surgery, load_backbone, similarity
from surgery.methods import Method
from surgery.towers import Visitor

KINDS = ("vit", "rn")


@pytest.fixture
def inputs(reference):
    """Images of a kind, texts [9, C] and the empty text [1, C]."""

    def of(kind):
        stored = reference(kind)
        texts = Texts(stored["text_features"], stored["text_features_empty"])
        return reference("inputs")[f"images_{kind}"], texts

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_surgery_gives_the_released_numbers(kind, inputs, reference, network):
    images, texts = inputs(kind)
    backbone = network(kind, class_token="released")
    found = explain(backbone, images, texts.features)
    assert found.shape == (3, 9, *found.shape[2:])
    expected = reference(kind)["surgery_similarity"][:, 1:]
    given = found.flatten(2).transpose(1, 2)
    torch.testing.assert_close(given, expected, rtol=0, atol=2e-5)


def test_one_text_is_compared_with_the_empty_one(inputs, network):
    images, texts = inputs("vit")
    backbone = network("vit")
    assert texts.redundant(backbone) is None
    assert torch.equal(texts[2:3].redundant(backbone), texts.empty)
    tokens = backbone.encode_image(images)
    expected = feature_surgery(
        tokens.patch_tokens,
        tokens.class_token,
        texts.features[2:3],
        redundant=texts.empty,
    )
    one = explain(backbone, images, texts[[2]])
    among_others = explain(backbone, images, texts, alone=True)[:, 2:3]
    for found in (one, among_others):
        given = found.flatten(2).transpose(1, 2)
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)


def test_the_empty_text_is_found_where_it_is_needed():
    backbone = load_backbone("demo", "demo")
    images = backbone.preprocess(torch.full((1, 3, 96, 96), 90, dtype=torch.uint8))
    empty, star = (backbone.encode_text(backbone.tokenizer([text])) for text in ("", "star"))
    found = explain(backbone, images, star)
    assert torch.equal(found, explain(backbone, images, Texts(star, empty)))
    named = Texts.encode(backbone, ["star"], ["{}"])
    assert torch.equal(named.redundant(backbone), empty)


def test_plain_clip_whatever_the_recipe_and_its_reverse(inputs, network):
    images, texts = inputs("vit")
    tokens = network("vit", attention="raw").encode_image(images)
    expected = similarity(tokens.patch_tokens, texts.features).transpose(1, 2).unflatten(2, (6, 6))
    found = explain(network("vit"), images, texts, method="clip")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(explain(network("vit"), images, texts, method="rclip"), -found)


@pytest.mark.parametrize("method", METHODS)
def test_an_image_has_its_numbers_in_any_batch(method, inputs, network):
    images, texts = inputs("vit")
    together = explain(network("vit"), images, texts, method=method)
    alone = explain(network("vit"), images[1:2], texts, method=method)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=2e-5)
    nothing = explain(network("vit"), images[:0], texts, method=method)
    assert nothing.shape == (0, 9, 6, 6)
    without_texts = explain(network("vit"), images, texts[:0], method=method)
    assert without_texts.shape == (3, 0, 6, 6)


def test_options_are_the_methods_own(inputs, network):
    images, texts = inputs("vit")
    plain = explain(network("vit"), images, texts, form="none")
    assert not torch.equal(plain, explain(network("vit"), images, texts, tau=1.0))
    with pytest.raises(ValueError, match=r"no method 'clop'.*did you mean 'clip'"):
        explain(network("vit"), images, texts, method="clop")
    with pytest.raises(ValueError, match=r"'clip' has no option 'tau': it has none"):
        explain(network("vit"), images, texts, method="clip", tau=1.0)
    with pytest.raises(ValueError, match=r"'surgery' has no option 'taw': it has form, tau, alone"):
        explain(network("vit"), images, texts, taw=1.0)


class Cells(Visitor):
    """Keeps what leaves the last block, as the leaf of a gradient."""

    def leave(self, step):
        self.x = step.x = step.x.detach().requires_grad_()


def gradients(backbone, images, texts):
    """Gradient times tokens of the last block: a method that needs gradients, in five lines."""
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    cells = Cells()
    token = backbone.tower.project(backbone.walk(images, cells))[:, 0]
    maps = []
    for text in texts.features:
        (gradient,) = torch.autograd.grad((token @ text).sum(), cells.x, retain_graph=True)
        maps.append((gradient[:, :1] * cells.x[:, 1:]).sum(-1))
    return torch.stack(maps, dim=1).unflatten(2, backbone.tower.grid(images.shape[2:]))


def test_a_method_with_gradients_is_one_row_and_runs_inside_of_predict(
    inputs, network, monkeypatch
):
    monkeypatch.setitem(METHODS, "gradients", Method(gradients, "", gradients=True))
    images, texts = inputs("vit")
    backbone = network("vit")
    expected = explain(backbone, images, texts, method="gradients")
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        own, text = images.clone(), texts.clone()
        assert own.is_inference()
        found = explain(backbone, own, text, method="gradients")
        assert torch.is_inference_mode_enabled()
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert found.abs().amax((2, 3)).min() > 0


def test_both_forms_of_feature_surgery_and_none_have_names(inputs, network):
    images, texts = inputs("vit")
    backbone = network("vit")
    for name, form in (("surgery_paper", "paper"), ("architecture", "none")):
        found = explain(backbone, images, texts, method=name)
        assert torch.equal(found, explain(backbone, images, texts, form=form))
        assert not torch.equal(found, explain(backbone, images, texts))


def test_methods_that_share_tokens_encode_the_images_once(inputs, network, monkeypatch):
    images, texts = inputs("vit")
    backbone = network("vit")
    names = ("surgery", "surgery_paper", "architecture", "clip", "rclip")
    with torch.inference_mode():  # where products round otherwise
        alone = {name: explain(backbone, images, texts, method=name) for name in names}
    encoded = []
    encode = type(backbone.tower).encode

    def counted(tower, pixels, *rest):
        encoded.append(pixels)
        return encode(tower, pixels, *rest)

    monkeypatch.setattr(type(backbone.tower), "encode", counted)
    with torch.inference_mode(), backbone.encoding_once(images):
        for name in names:
            assert torch.equal(explain(backbone, images, texts, method=name), alone[name])
        assert len(encoded) == 2
        explain(backbone, images.flip(0), texts)
        assert len(encoded) == 3
    explain(backbone, images, texts)
    assert len(encoded) == 4
