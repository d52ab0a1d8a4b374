"""Images at once: what does not fit the memory goes in halves, and that is remembered."""

import pytest
import torch

from surgery.batches import Batches
from surgery.towers.vit import ViT

SHORT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
]


class Small:
    """Encodes `most` images at a time; remembers how many it was asked for."""

    def __init__(self, most, error=SHORT_OF_MEMORY[0]):
        self.most, self.error, self.asked = most, error, []

    def __call__(self, images):
        self.asked.append(len(images))
        if len(images) > self.most:
            raise self.error
        return images.sum(1), -images


@pytest.mark.parametrize("error", SHORT_OF_MEMORY, ids=lambda e: str(e)[:20])
def test_halves_until_it_fits_and_stays_there(error):
    batches, small = Batches(), Small(2, error)
    images = torch.arange(14.0).view(7, 2)
    for _ in range(2):
        sums, negative = batches.run(small, images)
        assert torch.equal(sums, images.sum(1))
        assert torch.equal(negative, -images)
    assert small.asked == [7, 4, *[2, 2, 2, 1] * 2]
    assert batches.limit == 2


def test_a_fixed_number_is_filled_up():
    batches, small = Batches(4, fixed=True), Small(2)
    images = torch.arange(10.0).view(5, 2)
    assert torch.equal(batches.run(small, images)[0], images.sum(1))
    assert small.asked == [4, 2, 2, 2]
    assert batches.run(small, images[:0])[0].shape == (0,)


def test_what_fits_at_once_is_not_copied():
    images = torch.ones(3, 2)
    (same,) = Batches().run(lambda part: [part], images)
    assert same.data_ptr() == images.data_ptr()


def test_one_image_that_does_not_fit_and_other_errors():
    with pytest.raises(torch.OutOfMemoryError):
        Batches().run(Small(0), torch.ones(4, 2))
    other = Small(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        Batches().run(other, torch.ones(4, 2))
    assert other.asked == [4]


def test_every_way_of_encoding_shares_the_limit(network, reference, monkeypatch):
    images, encode, asked = reference("inputs")["images_vit"], ViT.encode, []
    # Batches of its own: the network is also that of other tests.
    backbone = network("vit").with_attention("surgery")
    backbone.batches = Batches()
    expected = backbone.encode_image(images)

    def small_only(self, part, *settings):
        asked.append(len(part))
        if len(part) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, part, *settings)

    monkeypatch.setattr(ViT, "encode", small_only)
    backbone.with_attention("raw").encode_image(images)
    assert asked == [3, 2, 1, 1, 1]
    found = backbone.encode_image(images)
    assert asked[5:] == [1, 1, 1]
    torch.testing.assert_close(found.patch_tokens, expected.patch_tokens, rtol=0, atol=2e-5)
