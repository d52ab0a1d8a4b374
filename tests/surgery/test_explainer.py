"""The short way for a person, and its pictures."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

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


def test_save(explainer, picture, tmp_path):
    explainer(picture, ["cat", "dog"]).save(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as saved:
        assert saved.size == (180, 40)


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
