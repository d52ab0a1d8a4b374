"""The image towers against the released code's numbers, and what that code cannot do."""

import copy
import json
import pickle
import shutil

import pytest
import torch

from surgery import RECIPES, ImageTokens, Recipe, feature_surgery, load_backbone
from surgery.towers import Visitor
from tests.surgery.recipes import OURS

KINDS = ("vit", "rn")
# As measured between 32 and 64 bits for the stored numbers, see the reference's own notes.
TOLERANCE = {"vit": 2e-5, "rn": 2e-4}


def joined(tokens: ImageTokens) -> torch.Tensor:
    return torch.cat([tokens.class_token[:, None], tokens.patch_tokens], dim=1)


def close(given, expected, atol):
    torch.testing.assert_close(given, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
class TestReleasedNumbers:
    def test_raw_is_plain_clip(self, kind, reference, network):
        images = reference("inputs")[f"images_{kind}"]
        tokens = network(kind, attention="raw").encode_image(images)
        close(joined(tokens), reference(kind)["image_tokens_raw"], TOLERANCE[kind])
        openai = reference(f"{kind}_openai")
        close(tokens.class_token, openai["image_features"], TOLERANCE[kind])

    @pytest.mark.parametrize("size", ["", "_large"])
    def test_surgery(self, kind, size, reference, network):
        images = reference("inputs")[f"images_{kind}{size}"]
        tokens = network(kind, class_token="released").encode_image(images)
        close(joined(tokens), reference(kind)[f"image_tokens_cs{size}"], TOLERANCE[kind])

    def test_class_token_is_clips_own(self, kind, reference, network):
        images = reference("inputs")[f"images_{kind}"]
        tokens = network(kind).encode_image(images)
        own = reference(f"{kind}_openai")["image_features"]
        close(tokens.class_token, own, TOLERANCE[kind])
        close(tokens.patch_tokens, reference(kind)["image_tokens_cs"][:, 1:], TOLERANCE[kind])

    def test_logits(self, kind, reference, network):
        backbone = network(kind)
        inputs = reference("inputs")
        image = backbone.encode_image(inputs[f"images_{kind}"]).class_token
        text = backbone.encode_text(inputs["token_ids"])
        image, text = (torch.nn.functional.normalize(x, dim=-1) for x in (image, text))
        logits = backbone.logit_scale * image @ text.T
        close(logits, reference(f"{kind}_openai")["logits_per_image"], 1e-4)


def test_raw_resnet_at_another_size(reference, network):
    images = reference("inputs")["images_rn_large"]
    tokens = network("rn", attention="raw").encode_image(images)
    close(joined(tokens), reference("rn")["image_tokens_raw_large"], TOLERANCE["rn"])


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_alternate_and_leave_no_trace(kind, reference, network):
    backbone = network(kind, class_token="released")
    inputs, expected = reference("inputs"), reference(kind)
    before = copy.deepcopy(backbone.state_dict())
    for size in ("", "_large", "", "_large"):
        tokens = backbone.encode_image(inputs[f"images_{kind}{size}"])
        close(joined(tokens), expected[f"image_tokens_cs{size}"], TOLERANCE[kind])
    assert before.keys() == backbone.state_dict().keys()
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["raw", "surgery", "gem", "naclip"])
def test_batch_does_not_matter(kind, attention, reference, network):
    backbone = network(kind, attention=attention)
    images = reference("inputs")[f"images_{kind}"]
    together = joined(backbone.encode_image(images))
    for index in range(3):
        alone = joined(backbone.encode_image(images[index : index + 1]))
        close(alone, together[index : index + 1], TOLERANCE[kind])


@pytest.mark.parametrize(("kind", "cell"), [("vit", 16), ("rn", 32)])
def test_images_need_not_be_square(kind, cell, reference, network):
    backbone = network(kind)
    wide = reference("inputs")[f"images_{kind}_large"][:, :, : 2 * cell]
    tokens = backbone.encode_image(wide)
    columns = wide.shape[3] // cell
    assert tokens.grid == (2, columns)
    assert tokens.patch_tokens.shape == (3, 2 * columns, 64)
    # Its mirror image along the diagonal, with the position embeddings mirrored too.
    mirrored = copy.deepcopy(backbone)
    visual = mirrored.model.visual
    own = visual.attnpool if kind == "rn" else visual
    side = round((len(own.positional_embedding) - 1) ** 0.5)
    cells = own.positional_embedding[1:].view(side, side, -1).transpose(0, 1)
    own.positional_embedding.data[1:] = cells.reshape(side * side, -1).clone()
    for module in visual.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.transpose(2, 3).contiguous()
    turned = mirrored.encode_image(wide.transpose(2, 3))
    assert turned.grid == (columns, 2)
    back = turned.patch_tokens.view(3, columns, 2, -1).transpose(1, 2).reshape(3, 2 * columns, -1)
    close(back, tokens.patch_tokens, TOLERANCE[kind])


@pytest.mark.parametrize(
    ("kind", "dtype", "limit"),
    [
        ("vit", torch.bfloat16, 5e-3),
        ("vit", torch.float16, 1e-3),
        ("rn", torch.bfloat16, 2e-2),  # convolutions on random weights: 3 % of the features
        ("rn", torch.float16, 4e-3),
    ],
    ids=str,
)
def test_autocast_stays_close(kind, dtype, limit, reference, network):
    backbone = network(kind)
    inputs = reference("inputs")
    text = reference(kind)["text_features"]
    similarities = []
    for enabled in (False, True):
        with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=enabled):
            tokens = backbone.encode_image(inputs[f"images_{kind}"])
            assert tokens.patch_tokens.dtype == tokens.class_token.dtype == torch.float32
            similarities.append(feature_surgery(tokens.patch_tokens, tokens.class_token, text))
    assert similarities[1].dtype == torch.float32
    assert (similarities[0] - similarities[1]).abs().max() < limit


@pytest.mark.parametrize("kind", KINDS)
def test_double_precision(kind, reference, network):
    backbone = copy.deepcopy(network(kind)).double()
    tokens = backbone.encode_image(reference("inputs")[f"images_{kind}"].double())
    assert tokens.patch_tokens.dtype == torch.float64
    expected = reference(kind)["image_tokens_cs"][:, 1:].double()
    close(tokens.patch_tokens, expected, TOLERANCE[kind])


def test_recipes_differ_only_as_they_say(reference, network, texts):
    images = reference("inputs")["images_vit"]
    assert network("vit", attention="raw", blocks=6).plan.blocks == 0
    none = network("vit", attention="surgery", blocks=0).encode_image(images)
    close(joined(none), reference("vit")["image_tokens_raw"], 2e-5)
    assert network("vit", attention="surgery", blocks=99).plan.blocks == 12
    own = reference("vit_openai")["image_features"]
    for name in RECIPES:
        tokens = network("vit", attention=OURS[name]).encode_image(images, texts=texts)
        assert tokens.patch_tokens.shape == (3, 36, 64)
        # RF-CLIP mends the original path too.
        if RECIPES[name].position != "none" and not name.startswith("rf_clip"):
            close(tokens.class_token, own, 2e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_without_gradients_it_writes_in_place_and_says_the_same(name, reference, network, texts):
    images = reference("inputs")["images_vit"].clone()
    backbone = network("vit", attention=OURS[name])
    expected = joined(backbone.encode_image(images, texts=texts))
    for _ in range(2):  # nothing of the network was written to either
        with torch.inference_mode():
            close(joined(backbone.encode_image(images, texts=texts)), expected, 2e-5)
    assert torch.equal(images, reference("inputs")["images_vit"])


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_gradients_reach_the_image(quick_gelu, reference, folder):
    backbone = load_backbone(
        folder / "vit.json", folder / "vit.safetensors", quick_gelu=quick_gelu
    ).double()
    images = reference("inputs")["images_vit"][:1].double().requires_grad_()
    backbone.encode_image(images).patch_tokens.sum().backward()
    step = 1e-4 * torch.randn_like(images)
    with torch.no_grad():
        up, down = (
            backbone.encode_image(images + sign * step).patch_tokens.sum() for sign in (1, -1)
        )
    close((images.grad * step).sum(), (up - down) / 2, 1e-8)


def test_autocast_follows_the_weights(reference, network):
    backbone = copy.deepcopy(network("vit"))
    images = reference("inputs")["images_vit"]
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        first = backbone.encode_image(images).patch_tokens
        assert torch.equal(backbone.encode_image(images).patch_tokens, first)
        assert torch.equal(
            backbone.with_attention("surgery").encode_image(images).patch_tokens, first
        )
    with torch.no_grad():
        backbone.model.visual.transformer.resblocks[-1].attn.out_proj.bias += 1
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(backbone.encode_image(images).patch_tokens, first)


def reference_modules(visual, images):
    """What each block of open_clip's own forward gives out, and its attention weights."""
    outputs, weights, hooks = [], [], []
    for block in visual.transformer.resblocks:

        def weigh(module, arguments, keywords, output):
            x = keywords.get("query", arguments[0] if arguments else None)
            own = torch.nn.MultiheadAttention.forward
            weights.append(own(module, x, x, x, average_attn_weights=False)[1])

        hooks.append(block.attn.register_forward_hook(weigh, with_kwargs=True))
        hooks.append(block.register_forward_hook(lambda m, a, output: outputs.append(output)))
    visual(images)
    for hook in hooks:
        hook.remove()
    return outputs, weights


class Keep(Visitor):
    """What a gradient method keeps: each block's attention weights, and what leaves it."""

    def __init__(self):
        self.weights, self.outputs = [], []

    def enter(self, step):
        if step.index == 0 and torch.is_grad_enabled():
            step.x = step.x.detach().requires_grad_()

    def attend(self, step):
        scale = step.q.shape[-1] ** -0.5
        self.weights.append((scale * step.q @ step.k.transpose(-2, -1)).softmax(dim=-1))
        return self.weights[-1] @ step.v

    def leave(self, step):
        self.outputs.append(step.x.clone())


def test_a_visitor_sees_every_block(reference, network):
    backbone, images = network("vit"), reference("inputs")["images_vit"]
    keep = Keep()
    with torch.inference_mode():
        last = backbone.walk(images, keep)
        outputs, weights = reference_modules(backbone.model.visual, images)
    assert len(keep.outputs) == len(outputs) == backbone.tower.depth
    for given, expected in zip(keep.outputs + keep.weights, outputs + weights, strict=True):
        close(given, expected, 2e-5)
    close(backbone.tower.project(last), reference("vit")["image_tokens_raw"], 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_visitor_can_ask_for_gradients(kind, reference, network):
    backbone, images = network(kind), reference("inputs")[f"images_{kind}"][:1]
    keep = Keep()
    with torch.enable_grad():
        token = backbone.tower.project(backbone.walk(images, keep, class_only=True))[:, 0]
        close(token, reference(f"{kind}_openai")["image_features"][:1], TOLERANCE[kind])
        gradients = torch.autograd.grad(token.sum(), keep.weights)
    assert len(gradients) == backbone.tower.depth
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_a_visitor_can_change_what_passes(reference, network):
    class Silence(Visitor):
        def attend(self, step):
            return torch.zeros_like(step.q)

    backbone, images = network("vit"), reference("inputs")["images_vit"]
    with torch.inference_mode():
        x = backbone.tower.project(backbone.walk(images, Silence()))
    torch.testing.assert_close(x[0, 0], x[1, 0])  # no token hears of any other


def test_qk_single_path_with_ffn_is_plain_clip(reference, network):
    plain = Recipe(pairs=("qk",), reads="itself", ffn=True)
    tokens = network("vit", attention=plain).encode_image(reference("inputs")["images_vit"])
    close(joined(tokens), reference("vit")["image_tokens_raw"], 2e-5)


def test_frozen(network):
    backbone = network("vit")
    assert not backbone.train().training
    assert not any(p.requires_grad for p in backbone.parameters())


def test_sizes_and_numbers_it_tells(network, folder):
    vit, rn = network("vit"), network("rn")
    assert (vit.image_size, rn.image_size) == ((96, 96), (96, 96))
    assert (vit.patch_size, rn.patch_size) == ((16, 16), (32, 32))
    assert (vit.embed_dim, vit.context_length) == (64, 77)
    assert 50 < vit.logit_scale < 150
    larger = load_backbone(str(folder / "vit.json"), image_size=(96, 144))
    assert larger.image_size == (96, 144)


def test_preprocess_normalises(network):
    backbone = network("vit")
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (backbone.mean, backbone.std))
    expected = (images.float() / 255 - mean) / std
    close(backbone.preprocess(images), expected, 1e-6)
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does for bf16-true
    try:
        given = backbone.preprocess(images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert given.dtype == torch.float32
    close(given, expected, 1e-6)


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="torch.compile needs a compiler"
)
def test_compiled_it_says_the_same(tmp_path, folder):
    config = json.loads((folder / "vit.json").read_text())
    config["vision_cfg"]["layers"] = 2
    path = tmp_path / "two_blocks.json"
    path.write_text(json.dumps(config))
    images = torch.rand(6, 3, *load_backbone(path).image_size)
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        eager, compiled = load_backbone(path), load_backbone(path, static_batch=4)
        for count in (4, 3, 6, 0):  # filled up, or cut, not compiled anew
            given, expected = (b.encode_image(images[:count]) for b in (compiled, eager))
            close(joined(given), joined(expected), TOLERANCE["vit"])
            assert given.grid == expected.grid
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert pickle.loads(pickle.dumps(compiled)).batches.limit == 4
    with pytest.raises(ValueError, match="static_batch=0"):
        load_backbone(path, static_batch=0)


def test_survives_pickling(reference, network):
    backbone = pickle.loads(pickle.dumps(network("vit")))
    tokens = backbone.encode_image(reference("inputs")["images_vit"])
    close(tokens.patch_tokens, reference("vit")["image_tokens_cs"][:, 1:], 2e-5)


def test_fingerprint_follows_the_weights(network):
    backbone = copy.deepcopy(network("vit"))
    first = backbone.fingerprint()
    assert first == network("vit").fingerprint() != network("rn").fingerprint()
    with torch.no_grad():
        backbone.model.ln_final.bias[3] += 1e-3
    changed = backbone.fingerprint()
    assert changed != first
    with torch.no_grad():
        backbone.model.ln_final.bias.copy_(network("vit").model.ln_final.bias)
    assert backbone.fingerprint() == first


def test_random_weights_are_the_same_everywhere(folder, caplog):
    torch.manual_seed(1)
    first = load_backbone(str(folder / "rn.json"))
    assert "random weights" in caplog.text
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == after  # the caller's random numbers are left alone
    assert load_backbone(str(folder / "rn.json")).fingerprint() == first.fingerprint()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 96, 96), r"expected \[B, 3, H, W\], given \[3, 96, 96\]"),
        (torch.zeros(1, 3, 96, 96, dtype=torch.uint8), "normalised floats"),
        (torch.zeros(1, 3, 96, 90), r"image size \(96, 90\).*\(16, 16\)"),
    ],
)
def test_images_it_refuses(images, message, network):
    with pytest.raises(ValueError, match=message):
        network("vit").encode_image(images)
