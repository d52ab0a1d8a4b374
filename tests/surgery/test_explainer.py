"""The short way for a person, and its pictures."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from surgery import Explainer
from surgery.visualize import heat_map, jet


@pytest.fixture
def explainer(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("CLIP_SURGERY_CACHE", str(tmp_path / "cache"))
    config = json.loads((folder / "vit.json").read_text())
    config["text_cfg"]["vocab_size"] = 49408
    path = tmp_path / "full.json"
    path.write_text(json.dumps(config))
    return Explainer(str(path), templates=("a photo of a {}.", "{}"))


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("names", [["cat", "dog"], ["cat"], "cat"])
def test_explains(names, explainer, picture):
    explanation = explainer(picture, names)
    count = len(explanation.names)
    assert explanation.maps.shape == (count, 40, 60)
    assert 0 <= explanation.maps.min() <= explanation.maps.max() <= 1
    assert explanation.maps.max() > 0.5
    assert explanation.scores.shape == (count,)
    assert explanation.overlays().shape == (count, 40, 60, 3)
    assert len(explanation.points) == count
    for points, labels in explanation.points:
        assert len(points) == len(labels) > 0


def test_all_kinds_of_images_agree(explainer, picture, tmp_path):
    picture.save(tmp_path / "image.png")
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    maps = [
        explainer(image, ["cat", "dog"]).maps
        for image in (picture, tmp_path / "image.png", str(tmp_path / "image.png"), tensor)
    ]
    assert all(torch.equal(each, maps[0]) for each in maps)
    assert explainer(picture.convert("L"), ["cat", "dog"]).image.shape == (40, 60, 3)
    with pytest.raises(ValueError, match=r"uint8 \[3, H, W\]"):
        explainer(torch.zeros(3, 8, 8), ["cat", "dog"])


def test_pictures_are_opened_as_predict_does(explainer, tmp_path):
    """What is transparent is not shown, and 16 bits are not white."""
    hidden = np.full((40, 60, 4), 50, np.uint8)
    hidden[..., 3] = 0
    Image.fromarray(hidden).save(tmp_path / "hidden.png")
    Image.fromarray(np.full((40, 60), 128 * 257, np.uint16)).save(tmp_path / "deep.png")
    for image in (tmp_path / "hidden.png", Image.fromarray(hidden)):
        assert (explainer(image, ["cat", "dog"]).image == 255).all()
    for image in (tmp_path / "deep.png", Image.open(tmp_path / "deep.png")):
        assert (explainer(image, ["cat", "dog"]).image == 128).all()


def test_a_file_that_is_no_picture_is_named(explainer, picture, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    picture.save(tmp_path / "b.png")
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    picture.save(tmp_path / "c.png")
    explainer.max_pixels = 2399
    for name, said in {"a.jpg": "EPS", "b.png": "", "c.png": "2399", "d.png": "no such"}.items():
        with pytest.raises(UserError, match=rf"{name}.*{said}"):
            explainer(tmp_path / name, ["cat", "dog"])


@pytest.mark.parametrize("name", ["out.png", "out", "out.JPG"])
def test_save(name, explainer, picture, tmp_path):
    explainer(picture, ["cat", "dog"]).save(tmp_path / name)
    (written,) = tmp_path.glob("out*")
    assert written.suffix
    with Image.open(written) as saved:
        assert saved.size == (180, 40)


def test_save_with_an_ending_of_no_picture(explainer, picture, tmp_path):
    with pytest.raises(UserError, match=r"out\.pic.*\.png"):
        explainer(picture, ["cat", "dog"]).save(tmp_path / "out.pic")


def test_show_says_what_is_missing(explainer, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        explainer(picture, ["cat", "dog"]).show()


def test_colours():
    low, middle, high = jet(torch.tensor([0.0, 0.5, 1.0])).tolist()
    assert low[2] > low[0] == low[1] == 0
    assert middle[1] == 255
    assert high[0] > high[1] == high[2] == 0


def test_heat_map_opacity():
    image = torch.full((2, 2, 3), 100, dtype=torch.uint8)
    values = torch.tensor([[0.0, 1.0], [0.5, 0.2]])
    assert torch.equal(heat_map(image, values, opacity=0.0), image)
    assert torch.equal(heat_map(image, values, opacity=1.0), jet(values))
    with pytest.raises(ValueError, match=r"uint8 \[2, 2, 3\]"):
        heat_map(image.float(), values)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, surgery; assert not {'torch', 'open_clip'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
