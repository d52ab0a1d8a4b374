"""The short way for a person, and its pictures."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import InvalidSetting, UserError
from surgery import Explainer, explain
from surgery.backbone import Backbone
from surgery.visualize import contact_sheet, heat_map, jet


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
    kinds = (picture, tmp_path / "image.png", str(tmp_path / "image.png"), tensor)
    kinds = (*kinds, np.array(picture))
    maps = [explainer(image, ["cat", "dog"]).maps for image in kinds]
    assert all(torch.equal(each, maps[0]) for each in maps)
    for several in (list(kinds), kinds):
        found = explainer(several, ["cat", "dog"])
        assert len(found) == len(kinds)
        assert all(torch.allclose(each.maps, maps[0], atol=1e-4) for each in found)
    assert explainer(picture.convert("L"), ["cat", "dog"]).image.shape == (40, 60, 3)
    assert explainer(np.array(picture)[..., 0], ["cat", "dog"]).image.shape == (40, 60, 3)


def test_images_of_several_sizes_in_batches(explainer, picture):
    explainer.batch_size = 2
    found = explainer([picture, picture.resize((30, 90)), picture], ["cat", "dog"])
    assert [one.maps.shape[1:] for one in found] == [(40, 60), (90, 30), (40, 60)]
    assert explainer([], "cat") == ()


@pytest.mark.parametrize(
    ("image", "names", "said"),
    [
        (torch.zeros(3, 8, 8), "cat", r"uint8 \[3, H, W\].*\(x \* 255\).*torch"),
        (np.zeros((8, 8, 3)), "cat", r"uint8 \[H, W, 3\].*\(x \* 255\).*numpy|np.uint8"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "cat", r"several images: list\(x\)"),
        (3, "cat", "given int"),
        (".", "cat", r"is a folder: list its pictures"),
        (np.zeros((8, 8, 3), np.uint8), [], "names: expected one or more"),
        (np.zeros((8, 8, 3), np.uint8), " ", "names: expected one or more"),
    ],
)
def test_what_can_not_be_explained_says_what_can(image, names, said, explainer):
    with pytest.raises(InvalidSetting, match=said):
        explainer(image, names)


def test_methods_side_by_side(explainer, picture, monkeypatch):
    """The numbers of `surgery.explain`, for as many passes as there are recipes."""
    passes = []
    encode = type(explainer.backbone.tower).encode
    monkeypatch.setattr(
        type(explainer.backbone.tower), "encode", lambda *a: passes.append(1) or encode(*a)
    )
    methods = ["clip", "surgery", "architecture", "rclip"]
    found = explainer(picture, ["cat", "dog"], methods=methods)
    assert len(passes) == 2
    assert list(found.methods) == methods
    assert torch.equal(found.maps, found.methods["clip"].maps)
    assert torch.allclose(found.methods["rclip"].maps, 1 - found.maps, atol=1e-5)
    backbone: Backbone = explainer.backbone
    size = backbone.image_size
    pixels = np.array(picture.resize(size[::-1], Image.Resampling.BICUBIC))
    images = backbone.preprocess(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    text = explainer._texts(("cat", "dog")).features
    for method in methods:
        theirs = explain(backbone, images, text, method)[0].flatten(1).T
        assert torch.allclose(found.methods[method].similarity, theirs, atol=1e-5)
    with pytest.raises(UserError, match="did you mean 'surgery'"):
        explainer(picture, "cat", methods=["surgry"])


def test_it_is_shown_in_a_line_and_as_a_picture(explainer, picture):
    found = explainer(picture, ["cat", "<b>"], methods=["surgery", "clip"])
    for shown in (explainer, found, found.methods["clip"], explainer([picture] * 2, "cat")):
        assert len(repr(shown).splitlines()) == 1
        assert len(repr(shown)) < 200
    assert "60x40" in repr(found)
    assert f"cat {found.scores[0]:.3f}" in repr(found)
    assert found._repr_png_().startswith(b"\x89PNG")
    page = found._repr_html_()
    assert page.startswith("<img ")
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert explainer([picture] * 2, "cat")._repr_html_().count("<img ") == 2


def test_names_that_a_model_was_never_taught_are_warned_of(caplog):
    demo = Explainer("demo", "demo")
    black = np.zeros((96, 96, 3), np.uint8)
    demo(black, ["star", "red circle"])
    assert not caplog.records
    demo([black, black], ["star", "red zebra", "remote control"])
    demo(black, ["star", "red zebra", "remote control"])
    (record,) = caplog.records
    assert "'red zebra' (zebra), 'remote control'" in record.getMessage()
    assert "star" in record.getMessage().partition("It knows")[2]


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
        width, height = saved.size
        assert width == 3 * 4 * 60  # enlarged, so that there is room for titles
        assert height > 4 * 40
        above = np.asarray(saved.convert("L"))[: height - 4 * 40]
    panels = np.split(above, 3, axis=1)
    assert all(panel.min() < 128 < panel.max() for panel in panels)  # letters on white
    assert not np.array_equal(panels[1], panels[2])


def test_many_panels_go_on_in_a_next_row(explainer, picture):
    found = explainer(picture, [f"thing {i}" for i in range(8)], methods=["surgery", "clip"])
    rows = found.panels()
    assert [len(row) for row in rows] == [7, 3, 7, 3]
    assert [row[0][0] for row in rows] == ["surgery", "surgery", "clip", "clip"]
    titles = [title for row in rows[:2] for title, _ in row[1:]]
    assert titles == [f"thing {i} {found.scores[i]:.3f}" for i in range(8)]


def test_a_long_title_stays_above_its_panel():
    white = torch.full((200, 200, 3), 255, dtype=torch.uint8)
    sheet = np.asarray(contact_sheet([[("x" * 500, white), ("", white)]]))
    assert (sheet[:, 200:] == 255).all()
    assert (sheet[:, :200] < 128).any()


def test_save_where_it_can_not(explainer, picture, tmp_path):
    with pytest.raises(UserError, match=r"out\.pic.*\.png"):
        explainer(picture, ["cat", "dog"]).save(tmp_path / "out.pic")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written"):
        explainer(picture, ["cat", "dog"]).save(tmp_path / "file" / "out")


def test_show_says_what_is_missing(explainer, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        explainer(picture, ["cat", "dog"]).show()


def test_show_without_a_screen_says_what_to_do(explainer, picture, monkeypatch):
    monkeypatch.setattr("matplotlib.get_backend", lambda: "agg")
    with pytest.warns(UserWarning, match=r"no screen.*save\(path\)"):
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
