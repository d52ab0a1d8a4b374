"""Feature surgery, maps and points against the released functions, and beyond where they work."""

import pytest
import torch

from surgery import feature_surgery, similarity, similarity_map, similarity_to_points
from surgery.features import prediction_surgery

KINDS = ("vit", "rn")


def close(given, expected, atol):
    torch.testing.assert_close(given, expected, rtol=0, atol=atol)


@pytest.fixture(params=KINDS)
def stored(request, reference):
    return reference(request.param)


@pytest.mark.parametrize("size", ["", "_large"])
class TestReleasedNumbers:
    def test_several_texts(self, size, stored):
        tokens = stored[f"image_tokens_cs{size}"]
        given = feature_surgery(tokens, tokens[:, 0], stored["text_features"])
        close(given, stored[f"surgery_similarity{size}"], 5e-6)

    def test_redundant(self, size, stored):
        tokens, empty = stored[f"image_tokens_cs{size}"], stored["text_features_empty"]
        expected = stored[f"surgery_similarity_redundant{size}"]
        given = feature_surgery(tokens, tokens[:, 0], stored["text_features"], redundant=empty)
        close(given, expected, 5e-6)
        one = feature_surgery(tokens, tokens[:, 0], stored["text_features"][2:3], redundant=empty)
        close(one, expected[..., 2:3], 5e-6)

    def test_points(self, size, stored):
        cells = stored[f"surgery_similarity{size}"][:, 1:]
        side = round(cells.shape[1] ** 0.5)
        for image in range(3):
            for text in range(9):
                count = stored[f"points_count{size}"][image, text]
                points, labels = similarity_to_points(
                    cells[image, :, text], (side, side), (50, 70), threshold=0.8
                )
                if side // 2 == 1:  # the released function answers a point without a label
                    assert len(points) == len(labels) > 0
                    continue
                assert torch.equal(points, stored[f"points{size}"][image, text, :count])
                expected = stored[f"point_labels{size}"][image, text, :count]
                assert torch.equal(labels, expected.long())


@pytest.mark.parametrize("form", ["code", "paper"])
def test_both_forms_in_double_precision(form, stored):
    tokens, text = stored["image_tokens_cs"].double(), stored["text_features"].double()
    given = feature_surgery(tokens, tokens[:, 0], text, form=form)
    assert given.dtype == torch.float64
    close(given, stored[f"feature_surgery_{form}"], 1e-14)


def test_maps(reference):
    vit, rn = reference("vit"), reference("rn")
    for similarity_, expected in (
        (vit["surgery_similarity"], vit["similarity_map"]),
        (vit["surgery_similarity_large"][:1], vit["similarity_map_large_image0"]),
        (rn["surgery_similarity"][:1], rn["similarity_map"]),
    ):
        side = round((similarity_.shape[1] - 1) ** 0.5)
        maps = similarity_map(similarity_[:, 1:], (side, side), (50, 70))
        close(maps.permute(0, 2, 3, 1), expected, 5e-5)


def test_tau_is_used():
    torch.manual_seed(0)
    patches, image, text = torch.randn(2, 5, 8), torch.randn(2, 8), torch.randn(3, 8)
    even = feature_surgery(patches, image, text, tau=0.0)
    cosine = similarity(patches, text)
    close(even, cosine - cosine.mean(-1, keepdim=True), 1e-6)
    assert (even - feature_surgery(patches, image, text)).abs().max() > 0.01


def test_scale_of_the_features_does_not_matter_and_zero_is_harmless():
    torch.manual_seed(0)
    patches, image, text = torch.randn(2, 5, 8), torch.randn(2, 8), torch.randn(3, 8)
    close(
        feature_surgery(9 * patches, 3 * image, 0.1 * text),
        feature_surgery(patches, image, text),
        1e-6,
    )
    patches[0, 0] = 0
    assert feature_surgery(patches, image, text).isfinite().all()


def test_half_precision_is_widened():
    torch.manual_seed(0)
    patches, image, text = (
        x.half() for x in (torch.randn(1, 5, 8), torch.randn(1, 8), torch.eye(8))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = feature_surgery(patches, image, text)
        maps = similarity_map(given, (1, 5), (2, 10))
    assert given.dtype == maps.dtype == torch.float32
    close(given, feature_surgery(patches.double(), image.double(), text.double()).float(), 1e-6)


def test_memory_does_not_grow_with_channels_times_texts():
    batch, cells, channels, texts = 1, 400, 512, 171
    data = torch.randn(batch, cells, channels), torch.randn(batch, channels)
    with torch.profiler.profile(profile_memory=True) as profile:
        feature_surgery(*data, torch.randn(texts, channels))
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 4 * batch * cells * texts * channels / 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(1, 8)}, "pass redundant="),
        ({"text": torch.zeros(3, 9)}, r"text: expected \[T, 8\], given \[3, 9\]"),
        ({"patch_tokens": torch.zeros(5, 8)}, r"patch_tokens: expected \[B, N, C\]"),
        ({"class_token": torch.zeros(3, 8)}, r"class_token: expected \[2, 8\], given \[3, 8\]"),
        ({"redundant": torch.zeros(8)}, r"redundant: expected \[1, 8\], given \[8\]"),
        ({"form": "eq8"}, "'code' or 'paper'"),
    ],
)
def test_what_it_refuses(change, message):
    arguments = {
        "patch_tokens": torch.zeros(2, 5, 8),
        "class_token": torch.zeros(2, 8),
        "text": torch.zeros(3, 8),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        feature_surgery(**arguments)


class TestMaps:
    @pytest.mark.parametrize("order", ["code", "paper"])
    def test_range_shape_and_constant(self, order):
        torch.manual_seed(0)
        scores = torch.randn(2, 6, 4)
        scores[:, :, 1] = 0.3
        maps = similarity_map(scores, (2, 3), (20, 31), order=order)
        assert maps.shape == (2, 4, 20, 31)
        assert 0 <= maps.min() <= maps.max() <= 1
        assert maps[:, 1].eq(0).all()

    def test_orders_differ_where_the_extremes_are_smoothed(self):
        scores = torch.tensor([0.0, 1.0, 0.2, 0.4]).view(1, 4, 1)
        code, paper = (
            similarity_map(scores, (2, 2), (3, 3), order=order)[0, 0] for order in ("code", "paper")
        )
        middle = torch.tensor(0.4)
        close(code[1, 1], middle, 1e-6)
        close(paper, (code - code.min()) / (code.max() - code.min()), 1e-6)

    def test_rows_come_first(self):
        scores = torch.arange(6.0).view(1, 6, 1)
        maps = similarity_map(scores, (2, 3), (2, 3))
        close(maps[0, 0], torch.arange(6.0).view(2, 3) / 5, 1e-6)

    def test_wrong_grid(self):
        with pytest.raises(ValueError, match=r"expected \[B, 6, T\] for grid \(2, 3\)"):
            similarity_map(torch.zeros(1, 7, 1), (2, 3), (4, 4))


class TestPoints:
    @pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 1)])
    def test_constant_map_gives_none(self, grid):
        points, labels = similarity_to_points(torch.ones(grid[0] * grid[1]), grid, (40, 60))
        assert points.shape == (0, 2)
        assert labels.shape == (0,)

    def test_a_grid_of_few_cells_is_not_shrunk_to_one(self):
        points, labels = similarity_to_points(torch.arange(4.0), (2, 2), (40, 60))
        assert points.tolist() == [[45, 30], [15, 10]]
        assert labels.tolist() == [1, 0]

    def test_not_square(self):
        scores = torch.arange(32.0).view(4, 8)
        points, labels = similarity_to_points(scores.flatten(), (4, 8), (100, 400))
        assert points[labels == 1][-1].tolist() == [350, 75]
        assert points[labels == 0][0].tolist() == [50, 25]
        assert (points >= 0).all()
        assert (points[:, 0] < 400).all()
        assert (points[:, 1] < 100).all()


@pytest.mark.parametrize("form", ["code", "paper"])
def test_predictions_are_feature_surgery_of_the_class_token(form):
    generator = torch.Generator().manual_seed(0)
    token, text = (torch.randn(n, 16, generator=generator) for n in (5, 7))
    expected = feature_surgery(token[:, None], token, text, form=form)[:, 0]
    cosines = similarity(token[:, None], text)[:, 0]
    found = prediction_surgery(cosines, form=form)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="two or more"):
        prediction_surgery(cosines[:, :1])
    with pytest.raises(ValueError, match="form"):
        prediction_surgery(cosines, form="other")
