"""The report: what stands in the page, against the run's own files; and the page in a real browser."""

import base64
import io
import json
import shutil
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from surgery import similarity_map
from tasks.__main__ import main
from tasks.report import write
from tasks.run import Masks, Run
from tests.tasks.conftest import members

EVIL = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>"


class Page(HTMLParser):
    """A page's elements, and the text of its data blocks by id."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.blocks, self.text, self._id = [], {}, "", None
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._id = dict(attrs).get("id", "") if tag == "script" else None

    def handle_data(self, data):
        if self._id is not None:
            self.blocks[self._id] = self.blocks.get(self._id, "") + data
        else:
            self.text += data

    @property
    def data(self):
        return json.loads(self.blocks["data"])

    def images(self):
        names = sorted((n for n in self.blocks if n.startswith("page-")), key=lambda n: int(n[5:]))
        return [image for name in names for image in json.loads(self.blocks[name])]


def report(*words) -> Path:
    assert main(["report", *map(str, words)]) == 0
    return Path(words[0]) / "report.html"


def cells_of(maps):
    cells = np.frombuffer(base64.b64decode(maps["cells"]), "<u2")
    return cells.reshape(-1, *maps["grid"]) / 65535


@pytest.fixture(scope="module")
def methods(predict, scenes, tmp_path_factory):
    """A run of two methods over six scenes, with the paper's order of min-max and enlarging."""
    folder = tmp_path_factory.mktemp("runs") / "methods"
    words = ("--model.methods=[surgery, clip]", "--model.order=paper", "--model.threshold=0.6")
    return predict(folder, *words, f"--data.shards={scenes}/000000.tar")


@pytest.fixture(scope="module")
def page(finished, methods, tmp_path_factory):
    # Of a copy: other tests compare what lies in the folder of the run.
    run = shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "finished")
    return report(run, methods)


def test_everything_of_a_run_is_in_one_file(page, finished):
    assert not page.with_name("report_files").exists()
    found = Page(page)
    summary = json.loads((finished / "metrics.json").read_text())
    for value in summary["metrics"].values():
        assert f"{100 * value:.1f}" in found.text
    assert [column["label"] for column in found.data["columns"]] == [
        "finished",
        "methods · surgery",
        "methods · clip",
    ]
    images = found.images()
    assert [image["key"] for image in images] == found.data["index"]["key"]
    assert len(images) == 20
    worst = [row[0] for row in found.data["index"]["quality"]]
    assert worst == sorted(worst)
    beside = [image for image in images if image["shard"] == "000000"]
    assert [image["columns"][2] is None for image in images].count(False) == len(beside) == 6


def test_masks_drawn_from_what_is_in_the_page_are_those_of_the_run(page, finished):
    shown = {image["key"]: image for image in Page(page).images()}
    unlike = total = 0
    for image in Run.load(finished).images():
        masks, maps = image.get(Masks), shown[image.key]["columns"][0]["maps"]
        cells = torch.from_numpy(cells_of(maps)).float().flatten(1).T[None]
        size = masks.masks.shape[1:]
        drawn = similarity_map(cells, tuple(maps["grid"]), size)[0] >= 0.5
        for number, mask in zip(masks.numbers, masks.masks, strict=True):
            unlike += int((drawn[maps["names"].index(number)].numpy() != mask).sum())
            total += mask.size
    assert unlike / total < 2e-4


def test_quality_is_that_of_the_masks_against_the_labels(page, finished, scenes):
    labels = {}
    for shard in sorted(scenes.glob("*.tar")):
        for name, data in members(shard).items():
            if name.endswith(".label.png"):
                labels[name.split(".")[0]] = np.asarray(Image.open(io.BytesIO(data)))
    shown = {image["key"]: image for image in Page(page).images()}
    for image in Run.load(finished).images(["000001"]):
        masks, found = image.get(Masks), shown[image.key]["columns"][0]["quality"]
        expected = {}
        for number, mask in zip(masks.numbers, masks.masks, strict=True):
            truth = labels[image.key] == number + 1
            expected[str(number)] = (mask & truth).sum() / (mask | truth).sum()
        assert found["classes"] == pytest.approx(expected, abs=1e-4)
        assert found["value"] == pytest.approx(np.mean(list(expected.values())), abs=1e-4)


@pytest.fixture(scope="module")
def hostile(finished, scenes, tmp_path_factory):
    """A copy of a run whose classes, captions and errors a stranger wrote; its shards have moved."""
    folder = tmp_path_factory.mktemp("hostile")
    run = folder / "run"
    shutil.copytree(finished, run)
    described = json.loads((run / "run.json").read_text())
    described["info"]["classes"][:2] = [EVIL, '$x_1$ & "y"']
    described["contents"] = {}
    (run / "run.json").write_text(json.dumps(described))
    summary = json.loads((run / "metrics.json").read_text())
    old = next(iter(summary["per_class"]))
    summary["per_class"] = {EVIL if n == old else n: v for n, v in summary["per_class"].items()}
    (run / "metrics.json").write_text(json.dumps(summary))
    error = {"shard": "000000", "key": EVIL, "reason": f"broken {EVIL}"}
    (run / "errors.jsonl").write_text(json.dumps(error) + "\n")
    (folder / "shards").mkdir()
    for shard in scenes.glob("*.tar"):
        with tarfile.open(folder / "shards" / shard.name, "w") as tar:
            for name, data in members(shard).items():
                data = EVIL.encode() if name.endswith(".txt") else data
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return run, folder / "shards"


def test_a_strangers_words_stay_words(hostile, page):
    run, shards = hostile
    found = Page(report(run, "--shards", shards))
    plain = Page(page)
    for tag in ("script", "img", "b", "iframe"):
        ours = 2 if tag == "b" else 0  # how many errors there are, in bold
        assert found.tags.count(tag) == plain.tags.count(tag) + ours
    assert found.data["classes"][0] == EVIL
    assert {image["caption"] for image in found.images()} == {EVIL}
    assert f"broken {EVIL}" in found.text


def test_maps_stand_alone_where_the_images_are_gone(hostile):
    run, _ = hostile
    found = Page(report(run))
    assert "4 of 4 input shards are not where they were" in found.text
    assert "Maps, masks and scores stand alone" in found.text
    assert all("image" not in image and image["columns"][0]["maps"] for image in found.images())


def test_every_task_has_what_it_says_of_an_image(predict, scenes, tmp_path):
    few = f"--data.shards={scenes}/000003.tar"
    expected = {
        "Segmentation": ("labels", "IoU"),
        "Recognition": ("scores", "AP of its classes"),
        "Interactive": ("points", "point accuracy"),
        "Multimodal": ("tokens", None),
        "Analysis": ("pictures", None),
    }
    for task, (part, measured) in expected.items():
        run = predict(tmp_path / task, few, "--writer.overlays=true", task=task)
        found = Page(report(run))
        assert len(found.images()) == 2
        for image in found.images():
            (answer,) = image["columns"]
            assert answer[part]
            assert answer.get("quality", {}).get("name") == measured
        assert (found.tags.count("figure") > 0) == (task in ("Analysis", "Multimodal"))


def test_what_is_no_run_is_told(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "is not a run's folder" in capsys.readouterr().err


def test_a_contact_sheet_has_a_row_an_image_and_a_column_a_method(
    finished, methods, tmp_path, capsys
):
    def sheet(name, *words):
        path = tmp_path / name
        options = ["--sheet", "--rows", "2", "--output", str(path), *words]
        assert main(["report", str(methods), str(finished), *options]) == 0
        return np.asarray(Image.open(path).convert("RGB")).astype(int)

    def columns(picture):
        """The middles of the four pictures of the first row, which white lies between."""
        height = len(picture)
        band = picture[int(0.25 * height) : int(0.4 * height)]
        inked = np.flatnonzero((band < 250).any((0, 2)))
        parts = np.split(inked, np.flatnonzero(np.diff(inked) > 1) + 1)
        middles = [int(part.mean()) for part in parts if len(part) > 100]
        assert len(middles) == 4
        return [band[:, middle - 60 : middle + 60] for middle in middles]

    image, *heat = columns(sheet("none.png", "--alpha", "0"))
    assert all(np.abs(one - image).mean() < 3 for one in heat)
    jet, viridis = sheet("jet.png"), sheet("viridis.png", "--colour-map", "viridis")
    assert np.abs(jet - viridis).mean() > 5
    image, *heat = columns(jet)
    assert all(np.abs(one - image).mean() > 10 for one in heat)
    for word, message in (
        ("--keys=nothing", "no image 'nothing'"),
        ("--colour-map=jett", "mean jet"),
    ):
        assert main(["report", str(methods), "--sheet", word]) == 1
        assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------ in a browser


@pytest.fixture
def visit(browser):
    """Open a page; at the end there must have been no error in its console."""
    said, tabs = [], []

    def go(path, *, errors=True, **options):
        tab = browser.new_page(**options)
        tabs.append(tab)
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on(
            "console",
            lambda message: errors and message.type == "error" and said.append(message.text),
        )
        tab.goto(path.as_uri())
        tab.wait_for_selector("#gallery[data-filled]")
        return tab

    yield go
    for tab in tabs:
        tab.close()
    assert said == []


def wait_for_redraw(tab):
    tab.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 60)))")


def test_pickers_sliders_filters_and_keys_do_what_they_say(visit, page):
    tab = visit(page, viewport={"width": 1300, "height": 900})
    data = Page(page).data

    def keys():
        return tab.locator(".card .key").all_inner_texts()

    worst = data["index"]["key"]
    assert keys() == worst[:20]
    tab.select_option("#sort", label="best IoU first, finished")
    tab.wait_for_function(
        "k => document.querySelector('.card .key').textContent === k", arg=worst[-1]
    )
    tab.select_option("#class", "3")
    tab.wait_for_function("() => location.hash === '#class=3'")
    having = [k for k, of in zip(worst, data["index"]["labels"], strict=True) if 3 in of]
    tab.wait_for_function(f"() => document.querySelectorAll('.card').length >= {len(having)}")
    assert set(having) <= set(keys())
    tab.select_option("#class", "")
    tab.fill("#find", worst[4])
    tab.wait_for_function("() => document.querySelectorAll('.card').length === 1")
    assert keys() == [worst[4]]
    tab.fill("#find", "")
    tab.wait_for_function("() => document.querySelectorAll('.card').length === 20")
    # One image, large, by the keyboard.
    tab.locator(".card").first.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#detail[open]")
    first = tab.inner_text("#detail-title")
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("k => document.getElementById('detail').dataset.key !== k", arg=first)

    def now():
        return tab.locator("#detail .now").all_inner_texts()

    pixels = "() => document.querySelectorAll('#detail canvas')[1].toDataURL()"
    wait_for_redraw(tab)
    before, drawn = now(), tab.evaluate(pixels)
    tab.locator("#threshold").evaluate(
        "e => { e.value = 0.1; e.dispatchEvent(new Event('input')); }"
    )
    wait_for_redraw(tab)
    assert now() != before
    assert tab.evaluate(pixels) != drawn
    tab.click("#own-threshold")
    wait_for_redraw(tab)
    assert now() == before
    assert tab.evaluate(pixels) == drawn
    for change in ("2", "3", "p", "t"):
        earlier = tab.evaluate(pixels)
        tab.keyboard.press(change)
        wait_for_redraw(tab)
        assert tab.evaluate(pixels) != earlier, change
    tab.keyboard.press("Escape")
    assert not tab.locator("#detail").is_visible()
    tab.locator("#methods input").nth(2).uncheck()
    tab.wait_for_function(
        "() => !document.getElementById('gallery').textContent.includes('methods · clip')"
    )


def test_the_browser_redraws_the_masks_of_the_run(visit, page, finished, methods):
    tab = visit(page)
    index = Page(page).data["index"]["key"]
    runs = [(0, finished, None), (1, methods, "surgery"), (2, methods, "clip")]
    for column, folder, method in runs:
        unlike = total = 0
        for image in Run.load(folder).images(["000000"]):
            masks = image.get(Masks, method)
            for number, mask in zip(masks.numbers, masks.masks, strict=True):
                drawn = tab.evaluate(
                    "async ([i, ...of]) => Array.from(report.maskOf(await report.item(i), ...of))",
                    [index.index(image.key), column, number, *mask.shape],
                )
                unlike += int((np.array(drawn).reshape(mask.shape) != mask).sum())
                total += mask.size
        assert unlike / total < 5e-4


def test_dark_narrow_and_hostile(visit, hostile):
    run, shards = hostile
    path = report(run, "--shards", shards)
    tab = visit(path, viewport={"width": 390, "height": 800}, color_scheme="dark")
    assert tab.evaluate("window.hacked") is None
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, ground.strip("rgb()").split(","))) < 60
    tab.click("#theme")
    tab.click("#theme")
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert min(map(int, ground.strip("rgb()").split(","))) > 200


def test_a_large_run_has_its_pages_beside(visit, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "PAGE", 6)
    monkeypatch.setattr(write, "INLINE", 0)
    monkeypatch.setattr(write, "FIRST", 0)
    path = tmp_path / "page.html"
    assert main(["report", str(finished), "--output", str(path)]) == 0
    assert sorted(p.name for p in (tmp_path / "page_files").iterdir()) == [
        "00001.js",
        "00002.js",
        "00003.js",
    ]
    tab = visit(path)
    assert len(tab.locator(".card").all()) == 6
    tab.click("#next")
    order = Page(path).data["index"]["key"]
    tab.wait_for_function(
        "k => document.querySelector('.card .key').textContent === k", arg=order[6]
    )
    shutil.rmtree(tmp_path / "page_files")
    tab = visit(path, errors=False)
    tab.click("#next")
    tab.wait_for_selector(".card .notice")
    assert "belongs beside this page" in tab.inner_text(".card .notice >> nth=0")
