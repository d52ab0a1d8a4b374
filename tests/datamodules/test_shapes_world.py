"""The drawn world: the same everywhere, exact masks, honest words."""

import hashlib
import re
from itertools import pairwise

import numpy as np
import pytest

from common.errors import InvalidSetting
from datamodules._drawing import (
    BACKGROUNDS,
    COLOURS,
    NOUNS,
    PREFIXES,
    UNSEEN_BACKGROUNDS,
    Draws,
    Scene,
    caption,
    draw_scene,
)
from datamodules.shapes import PALETTE, Shapes

MANY = 400


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(3, index, 48) for index in range(MANY)]


def digest(scene: Scene) -> str:
    parts = (scene.image.tobytes(), scene.label.tobytes(), scene.caption.encode())
    return hashlib.sha256(b"|".join(parts)).hexdigest()[:16]


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ((0, 0), {}, "91d0f0fadfe645c6"),
        ((0, 1), {}, "fa4bf3f4d64b4ccc"),
        ((7, 123456789), {}, "76810978cdcf3878"),
        ((0, 2, (60, 100)), {}, "7a23ca70bd787548"),
        ((0, 0), {"difficulty": 0.0}, "85176dd5f9d0fa1c"),
        ((0, 3), {"background": "clouds"}, "32892efea7b059ac"),
        ((1, 4, 32), {"background": "plain"}, "965879eb4aa9bfe2"),
        ((1, 4, 32), {"background": "gradient"}, "d0a03518e66042e4"),
        ((1, 4, 32), {"background": "noise"}, "53a53736cfb63601"),
        ((1, 4, 32), {"background": "stripes"}, "8ac3b0f33a763d95"),
        ((1, 4, 32), {"background": "checkers"}, "4d142fc7bcd0b69d"),
        ((1, 4, 32), {"background": "dots"}, "53eaf4501288ac09"),
    ],
)
def test_a_scene_never_changes(arguments, options, expected):
    scene = draw_scene(*arguments, **options)
    assert digest(scene) == expected
    assert digest(draw_scene(*arguments, **options)) == expected


def test_another_seed_or_index_is_another_scene():
    seen = {digest(draw_scene(seed, index, 32)) for seed in range(4) for index in range(8)}
    assert len(seen) == 32


def test_the_raw_stream_is_pcg64():
    # Raw words are promised by NumPy for ever; these are they.
    words = np.random.PCG64(np.random.SeedSequence((1, 2))).random_raw(64) >> np.uint64(11)
    draws = Draws(1, 2)
    assert [draws.unit() for _ in range(64)] == [float(word) * 2.0**-53 for word in words[::-1]]
    assert sorted(draws.some(12, 12)) == list(range(12))
    assert {Draws(9, i).below(3) for i in range(40)} == {0, 1, 2}


def test_arrays(scenes):
    for scene in scenes[:20]:
        assert scene.image.shape == (48, 48, 3)
        assert scene.image.dtype == np.uint8
        assert scene.label.shape == (48, 48)
        assert scene.label.dtype == np.uint8
        assert scene.image.flags["C_CONTIGUOUS"]
    assert len(NOUNS) == len(PALETTE) == len(set(PALETTE)) == 12
    assert len(COLOURS) == 8
    assert len(BACKGROUNDS) == 6


def test_nouns_are_different_and_exactly_those_visible(scenes):
    for scene in scenes:
        assert len(set(scene.nouns)) == len(scene.nouns) == len(scene.colours)
        assert 1 <= len(scene.nouns) <= 4
        there = {NOUNS[value - 1] for value in np.unique(scene.label) if value}
        assert there == set(scene.nouns)


def test_objects_are_well_visible(scenes):
    for scene in scenes:
        counts = np.bincount(scene.label.ravel(), minlength=13)
        assert min(counts[NOUNS.index(noun) + 1] for noun in scene.nouns) >= 20  # of 2,304


def test_everything_occurs(scenes):
    assert {noun for scene in scenes for noun in scene.nouns} == set(NOUNS)
    assert {colour for scene in scenes for colour in scene.colours} == set(COLOURS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {len(scene.nouns) for scene in scenes} == {1, 2, 3, 4}


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text)


def test_a_caption_names_only_what_is_there(scenes):
    named, coloured, grounds, subsets = 0, 0, 0, 0
    for scene in scenes:
        words = words_of(scene.caption)
        nouns = [word for word in words if word in NOUNS]
        assert nouns
        assert len(set(nouns)) == len(nouns)
        assert set(nouns) <= set(scene.nouns)
        for before, noun in pairwise(words):
            if noun in NOUNS and before in COLOURS:
                assert scene.colours[scene.nouns.index(noun)] == before
                coloured += 1
        named += len(nouns)
        subsets += len(nouns) < len(scene.nouns)
        on = [kind for kind, phrase in BACKGROUNDS.items() if phrase in scene.caption]
        assert on in ([], [scene.background])
        grounds += len(on)
    assert 0.5 < coloured / named < 0.7
    assert 0.12 < grounds / MANY < 0.28
    assert 0.08 < subsets / MANY < 0.22


def test_captions_use_few_words(scenes):
    phrases = (*NOUNS, *COLOURS, *BACKGROUNDS.values(), *PREFIXES, "an and with")
    vocabulary = {word for phrase in phrases for word in words_of(phrase)}
    assert len(vocabulary) <= 55
    assert {word for scene in scenes for word in words_of(scene.caption)} <= vocabulary


def test_a_caption_can_be_worded_anew():
    draws = Draws(0)
    texts = {caption(draws, ("circle", "arrow"), ("red", "blue"), "dots") for _ in range(60)}
    assert len(texts) > 30
    assert any("an arrow" in text for text in texts)
    assert not any("a arrow" in text for text in texts)


@pytest.mark.parametrize("index", range(12))
def test_masks_are_exact(index):
    # Recomputed at 8 times the resolution, where 8 x 8 labels say how much of a pixel is whose.
    # Sixteen samples a pixel leave those open which are shared about evenly.
    scene, fine = draw_scene(5, index, 64), draw_scene(5, index, 512)
    cells = fine.label.reshape(64, 8, 64, 8).transpose(0, 2, 1, 3).reshape(64, 64, 64)
    shares = np.stack([(cells == value).mean(2) for value in range(13)], 2)
    sure = shares.max(2) > 0.7
    assert sure.mean() > 0.95
    np.testing.assert_array_equal(scene.label[sure], shares.argmax(2)[sure])
    for value in range(13):
        assert abs((scene.label == value).mean() - (fine.label == value).mean()) < 0.01


@pytest.mark.parametrize("index", range(6))
def test_another_size_is_the_same_scene(index):
    small, large = draw_scene(2, index, 96), draw_scene(2, index, 192)
    assert small.caption == large.caption
    assert (small.nouns, small.colours, small.background) == (
        large.nouns,
        large.colours,
        large.background,
    )
    assert (small.label == large.label[::2, ::2]).mean() > 0.97
    shrunk = large.image.reshape(96, 2, 96, 2, 3).mean((1, 3))
    assert np.abs(shrunk - small.image).mean() < 8.0  # the noise of both, and edges


def test_a_wider_frame_keeps_the_objects():
    square, wide = draw_scene(4, 1, 64), draw_scene(4, 1, (64, 128))
    assert wide.image.shape == (64, 128, 3)
    assert wide.caption == square.caption
    assert {NOUNS[v - 1] for v in np.unique(wide.label) if v} == set(wide.nouns)


def test_objects_have_the_colour_they_are_said_to_have(scenes):
    near = 0
    total = 0
    for scene in scenes[:100]:
        for noun, colour in zip(scene.nouns, scene.colours, strict=True):
            pixels = scene.image[scene.label == NOUNS.index(noun) + 1].astype(float)
            middle = np.median(pixels, 0)
            distances = {
                name: np.abs(middle / middle.max() - np.array(rgb) / max(rgb)).sum()
                for name, rgb in COLOURS.items()
            }
            near += min(distances, key=distances.__getitem__) == colour
            total += 1
    assert near / total > 0.9


def test_difficulty_zero_is_one_white_object_in_the_middle():
    for index in range(10):
        scene = draw_scene(0, index, 48, difficulty=0.0)
        assert scene.colours == ("white",)
        assert scene.background == "plain"
        assert scene.image[scene.label > 0].mean() > 200
        assert scene.image[0].mean() < 60


def test_the_ground_brightens_last():
    def ground(difficulty: float) -> float:
        scenes = [draw_scene(3, index, 48, difficulty=difficulty) for index in range(100)]
        return float(np.mean([scene.image[scene.label == 0].mean() for scene in scenes]))

    dark, bright = ground(0.75), ground(1.0)
    assert ground(0.0) < dark < 75
    assert bright > 1.4 * dark
    assert {len(draw_scene(3, i, 48, difficulty=0.75).nouns) for i in range(50)} == {1, 2, 3, 4}


@pytest.mark.parametrize("kind", [*BACKGROUNDS, *UNSEEN_BACKGROUNDS])
def test_a_background_can_be_chosen(kind):
    scene = draw_scene(0, 5, 48, background=kind)
    assert scene.background == kind
    np.testing.assert_array_equal(scene.label, draw_scene(0, 5, 48).label)
    assert not any(unseen in scene.caption for unseen in UNSEEN_BACKGROUNDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "at least one pixel"),
        ({"size": (10, 0)}, "at least one pixel"),
        ({"difficulty": 1.5}, "difficulty in"),
        ({"background": "sand"}, "plain, gradient, noise"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        draw_scene(0, 0, **options)


def test_no_scenes_are_refused_by_the_name_of_the_field(tmp_path):
    with pytest.raises(InvalidSetting, match=r"--data.scenes must be at least 1, got 0"):
        Shapes(str(tmp_path / "shapes"), scenes=0).prepare_data()
