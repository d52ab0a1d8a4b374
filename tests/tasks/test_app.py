"""The app: what its page is told, and the page in a real browser."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from datamodules import draw_scene
from surgery.visualize import heat_map
from tasks.__main__ import main
from tasks.app.answers import LARGEST, Answers, names_in, opened
from tasks.app.figures import (
    MASK,
    POINTS,
    SAM,
    View,
    caption_page,
    draw,
    maps_page,
    notice_page,
    token_choices,
)
from tests.tasks.test_interactive import sam_folder

EVIL = "<img src=x onerror=window.hacked=1>${window.hacked=1}{{value}}"


@pytest.fixture(scope="module")
def answers():
    return Answers(any_model=False)


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    Image.fromarray(draw_scene(2026, 41, 96).image).save(path)
    return path


@pytest.fixture(scope="module")
def answer(answers, scene):
    return answers.explain("demo", scene, "star, heart\nring, star", ["surgery", "clip"])


def test_maps_stand_by_name_and_method(answer):
    found = answer.explanation
    assert found.names == ("star", "heart", "ring")
    page = maps_page(answer, View())
    assert page.count("<section>") == 3
    assert re.findall(r"<b>(\w+)</b>", page) == ["surgery", "clip"] * 3
    for name, score in zip(found.names, found.scores, strict=True):
        assert f"<h3>{name} <small>cosine {score:.3f}</small>" in page


def test_views_are_those_of_the_explanation(answer):
    found = answer.explanation
    maps = found.methods["clip"].maps
    heat, _ = draw(found, "clip", 1, View(opacity=0.3, colour_map="cividis"))
    assert np.array_equal(
        heat, heat_map(found.image, maps[1], opacity=0.3, colour_map="cividis").numpy()
    )
    for threshold in (0.2, 0.7):
        pixels, told = draw(found, "clip", 1, View(MASK, mask_from=threshold))
        assert told == f"{(maps[1] >= threshold).float().mean():.0%} of the picture"
        assert pixels.shape[2] == 3
    points, labels = found.methods["clip"].points[2]
    _, told = draw(found, "clip", 2, View(POINTS))
    assert told == f"{int(labels.sum())} on it, {len(points) - int(labels.sum())} off it"


def test_what_the_model_was_never_taught_is_told(answers, answer, scene):
    assert answer.notice == ""
    told = answers.explain("demo", scene, f"star, teapot, {EVIL}", ["clip"])
    assert "never taught the words of 'teapot'" in told.notice
    page = maps_page(told, View()) + notice_page(told.notice)
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page


def test_a_caption_and_the_words_of_clip_itself(answers, scene):
    found, notice = answers.caption("demo", scene, "a star and a heart")
    assert notice == ""
    assert found.tokens == ("[start]", "a", "star", "and", "a", "heart", "[end]")
    assert sorted(found.order) == list(range(7))
    assert found.scores[found.order[0]] == found.scores.max()
    choices = token_choices(found)
    assert f"1.  {found.scores.max():.3f}" in choices[found.order[0]][0]
    assert found.map(2).shape == (96, 96)
    assert "Where <b>star</b> is" in caption_page(found, 2, View())
    own = answers.words("demo", scene, steps=4)
    assert own.counts == tuple(sorted(own.counts, reverse=True))
    assert f"{own.counts[0]} times" in maps_page(own, View())


def test_sam_masks_what_points_are_on(answers, answer, tmp_path):
    from tasks._sam import PointSegmenter

    with_sam = Answers(any_model=False, sam=str(sam_folder(tmp_path, "sam")))
    assert with_sam.has_sam
    assert not answers.has_sam
    masks = with_sam.sam_masks(answer.explanation, 0.8)
    assert list(masks) == ["surgery", "clip"]
    image = answer.explanation.image.permute(2, 0, 1)
    points = [answer.explanation.methods["clip"].points[1]]
    ((mask, estimate),) = PointSegmenter(str(tmp_path))(image, points)
    assert np.array_equal(masks["clip"][1][0], mask.numpy())
    page = maps_page(answer, View(SAM), masks)
    assert f"SAM expects an IoU of {estimate:.2f}" in page


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        ({"words": " ,\n"}, "one or more words"),
        ({"words": ",".join(map(str, range(21)))}, "at most 20"),
        ({"methods": []}, "Choose a method"),
        ({"picture": None}, "Drop a picture"),
        ({"model": "ViT-B-16 openai"}, "it offers demo, and no other"),
    ],
)
def test_what_can_not_be_answered_is_told(answers, scene, ask, said):
    asked = {"model": "demo", "picture": scene, "words": "star", "methods": ["clip"], **ask}
    with pytest.raises(UserError, match=said):
        answers.explain(**asked)


def test_pictures_are_a_strangers(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    buffer = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(buffer, format="PNG")
    (tmp_path / "bomb.png").write_bytes(buffer.getvalue())
    for name, said in {
        "a.jpg": "EPS",
        "bomb.png": "max_pixels",
        "none.png": "can't be read",
    }.items():
        with pytest.raises(UserError, match=f"{name}.*{said}"):
            opened(tmp_path / name)
    Image.new("RGB", (3 * LARGEST, LARGEST)).save(tmp_path / "wide.png")
    assert opened(tmp_path / "wide.png").size == (LARGEST, LARGEST // 3)


def test_names_keep_their_order():
    assert names_in("red star; moon\nred  star,") == ["red star", "moon"]


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("tasks.commands.app.find_spec", lambda name: None)
    assert main(["app"]) == 1
    assert "pip install 'clip-surgery-lightning[app]'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def address(answers, tmp_path_factory):
    pytest.importorskip("gradio")
    from tasks.app.page import serve

    blocks, address = serve(answers, folder=tmp_path_factory.mktemp("app"))
    yield address
    blocks.close(verbose=False)


def test_the_page_answers(browser, address, tmp_path):
    tab = browser.new_page(viewport={"width": 1300, "height": 900})
    said, asked = [], []
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("console", lambda m: m.type == "error" and said.append(m.text))
    tab.on("request", lambda request: asked.append(request.url))
    tab.set_default_timeout(60_000)
    tab.goto(address)
    tab.wait_for_selector("#maps figure img")
    pictures = "() => [...document.querySelectorAll('#maps img')].map((i) => i.src.length).join()"
    names = "() => [...document.querySelectorAll('#maps h3')].map((h) => h.firstChild.data.trim()).join()"

    def changed(of, before):
        tab.wait_for_function(f"before => ({of})() !== before", arg=before)

    def wait_for(text, place="#notice"):
        tab.wait_for_function(
            "([place, text]) => document.querySelector(place).textContent.includes(text)",
            arg=[place, text],
        )

    # Words by the keyboard, a stranger's and one that was never taught among them.
    before = tab.evaluate(names)
    tab.fill("#words textarea", f"star, teapot, {EVIL}")
    tab.press("#words textarea", "Enter")
    changed(names, before)
    wait_for("never taught the words of 'teapot'")
    wait_for(EVIL, "#maps")
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("#maps figure").count() == 6
    # Another view, another threshold.
    before = tab.evaluate(pictures)
    tab.get_by_label("Mask", exact=True).check()
    wait_for("% of the picture", "#maps")
    told = "() => document.querySelector('#maps figcaption').textContent"
    before = tab.evaluate(told)
    tab.locator("#view input[type=range]:visible").focus()
    for _ in range(5):
        tab.keyboard.press("PageUp")
    changed(told, before)
    # One method less; another example; a caption; what is no picture.
    tab.locator("#methods").get_by_label("clip", exact=True).uncheck()
    tab.wait_for_function("() => document.querySelectorAll('#maps figure').length === 3")
    before = tab.evaluate(names)
    tab.locator("#examples button, #examples [role=button]").nth(2).click()
    changed(names, before)
    tab.get_by_role("tab", name="Caption").click()
    tab.click("#read")
    tab.wait_for_selector("#caption img")
    (tmp_path / "no.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    tab.set_input_files("#picture input[type=file]", tmp_path / "no.png")
    wait_for("no.png")
    assert tab.locator("#notice [role=alert]").count() == 1
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)
    assert said == []
    tab.close()
