"""Attention's two ways on CPUs: the same numbers, and the one that is faster on this machine."""

import math

import pytest
import torch

from surgery import softmax_attention


@pytest.fixture
def heads():
    """Queries, keys and values of 3 images, 5 heads, 7 and 11 tokens: strided as towers have them."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 11, 3 * 40, generator=draw)
    q, k, v = (x.view(3, 11, 5, 8).transpose(1, 2) for x in tokens.chunk(3, dim=-1))
    return q[:, :, 4:], k, v


@pytest.mark.parametrize("mask", [None, (7, 11), (3, 1, 7, 11), (3, 5, 7, 11)])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("room", [1, 160, 10**9], ids=["by head", "by two heads", "at once"])
def test_products_are_the_formula(heads, mask, scale, room, monkeypatch):
    monkeypatch.setattr(softmax_attention, "ROOM", room)
    q, k, v = heads
    mask = None if mask is None else torch.randn(mask, generator=torch.Generator().manual_seed(1))
    logits = (
        q.double() @ k.double().transpose(-2, -1) * (1 / math.sqrt(8) if scale is None else scale)
    )
    logits = logits if mask is None else logits + mask
    expected = logits.softmax(dim=-1) @ v.double()
    found = softmax_attention.products(q, k, v, mask, scale=scale)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.fixture
def pretend(monkeypatch):
    """`pretend(fused, own)`: how long the fused kernel and the products seem to take from now on."""

    def times(fused, own):
        def seconds(function, *inputs):
            assert torch.get_num_threads() == 1  # others' time would not be counted
            return own if function is softmax_attention.products else fused

        monkeypatch.setattr(softmax_attention, "_seconds", seconds)
        monkeypatch.setattr(softmax_attention, "_chosen", {})

    return times


def encode(backbone, images):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        return backbone.encode_image(images).patch_tokens


@pytest.mark.parametrize("name", ["surgery", "sclip", "naclip", "gem", "pearl", "raw"])
def test_recipes_say_the_same_either_way(name, pretend, network, reference, monkeypatch):
    monkeypatch.setattr(softmax_attention, "MANY_KEYS", 2)
    backbone = network("vit").with_attention(name)
    images = reference("inputs")["images_vit"]
    pretend(fused=1.0, own=2.0)
    fused = encode(backbone, images)
    pretend(fused=2.0, own=1.0)
    products = encode(backbone, images)
    assert not torch.equal(fused, products)  # it is the other way
    assert torch.cosine_similarity(fused, products, dim=-1).min() > 0.999


def test_what_takes_the_fused_kernel_anyway(pretend, heads, monkeypatch):
    pretend(fused=2.0, own=1.0)
    called = []
    real = softmax_attention.products
    monkeypatch.setattr(softmax_attention, "products", lambda *x, **y: called.append(1) or real(*x))
    attend = softmax_attention.softmax_attention
    few = [x.bfloat16() for x in heads]
    with torch.no_grad():
        attend(*few)  # few keys
        monkeypatch.setattr(softmax_attention, "MANY_KEYS", 2)
        attend(*heads)  # 32 bits
        attend(few[0][:, :, :1], *few[1:])  # one query
    attend(*few)  # gradients are recorded
    assert not called
    with torch.no_grad():
        attend(*few)
    assert called


def test_the_choice_is_measured_once_or_told(pretend):
    threads = torch.get_num_threads()
    pretend(fused=1.0, own=0.85)
    assert softmax_attention.by_products(torch.bfloat16)
    assert torch.get_num_threads() == threads
    pretend(fused=1.0, own=0.95)  # not clearly faster
    assert not softmax_attention.by_products(torch.bfloat16)
    softmax_attention.choose(torch.bfloat16, True)
    assert softmax_attention.by_products(torch.bfloat16)
    assert not softmax_attention.by_products(torch.float16)


def test_no_images(pretend, network, monkeypatch):
    monkeypatch.setattr(softmax_attention, "MANY_KEYS", 2)
    pretend(fused=2.0, own=1.0)
    images = torch.zeros(0, 3, *network("vit").image_size)
    assert encode(network("vit"), images).shape[0] == 0


def test_a_compiled_network_takes_the_fused_kernel(pretend, monkeypatch):
    monkeypatch.setattr(softmax_attention, "MANY_KEYS", 2)
    pretend(fused=2.0, own=1.0)
    q = k = v = torch.randn(1, 2, 9, 8, dtype=torch.bfloat16)
    compiled = torch.compile(softmax_attention.softmax_attention, backend="eager", fullgraph=True)
    with torch.inference_mode():
        fused = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert torch.equal(compiled(q, k, v), fused)


def test_this_machine_can_be_measured():
    assert 0 < softmax_attention.ratio(torch.bfloat16) < math.inf
