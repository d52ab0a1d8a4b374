"""Images resized as OpenCV does it, against OpenCV."""

from zlib import crc32

import pytest
import torch

from datamodules._resize import opencv_bilinear, opencv_size

# Size, size wanted, checksum of what OpenCV 4.10 and 5.0 answer.
CASES = [
    ((37, 50), (33, 44), 2016208025),
    ((51, 37), (17, 99), 1992179887),
    ((40, 64), (20, 32), 797994168),
    ((3, 5), (33, 56), 2295449953),
    ((1, 7), (5, 9), 2395586725),
    ((60, 21), (91, 20), 486129144),
]


def picture(size):
    return torch.randint(
        0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(size[0])
    )


@pytest.mark.parametrize(("size", "wanted", "checksum"), CASES)
def test_the_bytes_are_opencvs(size, wanted, checksum):
    found = opencv_bilinear(picture(size), wanted)
    assert found.shape == (3, *wanted)
    assert crc32(found.numpy().tobytes()) == checksum


@pytest.mark.parametrize(("size", "wanted", "checksum"), CASES)
def test_opencv_itself_says_so(size, wanted, checksum):
    cv2 = pytest.importorskip("cv2")
    image = picture(size).permute(1, 2, 0).contiguous().numpy()
    there = cv2.resize(image, (wanted[1], wanted[0]), interpolation=cv2.INTER_LINEAR)
    assert crc32(torch.from_numpy(there).permute(2, 0, 1).contiguous().numpy()) == checksum


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((375, 500), 336, (336, 448)),
        ((334, 500), 336, (336, 503)),
        ((500, 333), 336, (505, 336)),
        ((1024, 2048), 560, (560, 1120)),
        ((30, 4000), 336, (15, 2048)),
    ],
)
def test_sides_are_rounded_and_the_long_one_bounded(size, short_side, expected):
    assert opencv_size(size, short_side) == expected
