"""Every experiment through the real command, on miniature data sets in their official layouts.

The tiny network stands in for each backbone, so one config an experiment is enough. The data sets
hold what the real ones do: void pixels, one mask a class, labels of 16 bits, missing captions,
images without any of the classes.
"""

import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from datamodules import DATASETS, READ_AS_THEY_ARE
from tasks.__main__ import main
from tasks._configs import FOLDER, names_of
from tests.datamodules import fakes
from tests.tasks.conftest import members

EXPERIMENTS = {path.stem: path.name for path in FOLDER.glob("*.yaml")} | {
    name: f"vit_b16_{name}" for name in names_of("experiments")
}
"""What an experiment is called without its backbone -> a config of it."""

DATA_SETS = {
    "ADE20K": fakes.fake_ade20k,
    "COCO": fakes.fake_coco,
    "COCOObject": fakes.fake_coco_object,
    "COCOStuff": fakes.fake_coco_stuff,
    "Cityscapes": fakes.fake_cityscapes,
    "GCC3M": fakes.fake_gcc3m,
    "ImageNetS": fakes.fake_imagenet_s,
    "NUSWide": fakes.fake_nus_wide,
    "PascalContext": fakes.fake_pascal_context,
    "VOC": fakes.fake_voc,
}
NAMES = {cls: name for name, cls in DATASETS.items()}
BRIEF = ("steps=3", "sequences=2", "length=2", "views=2", "explained=2")
"""Fields of Opinions, for a climb that takes no time."""

DRAWN = ("--writer.layout=files", "--writer.overlays=true", "--data.batch_size=3")


@pytest.fixture(scope="session")
def official(tmp_path_factory):
    """Class of a data set -> where its samples are, and what is in them; converted on first use."""
    made = {}

    def find(name: str):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            truth = DATA_SETS[name](root / "source")
            shards = root / "source"
            if NAMES[name] not in READ_AS_THEY_ARE:
                shards = root / "shards"
                words = ["shards", NAMES[name], "--source", root / "source"]
                words += ["--output", shards, "--workers", "1", "--shard-size", "3"]
                assert main([str(word) for word in words]) == 0
            made[name] = shards, truth
        return made[name]

    return find


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, size in enumerate(fakes.SIZES[:2]):
        fakes.picture(folder / f"{i}.jpg", size)
    return folder


@pytest.fixture
def experiment(tiny, official, photos, capsys, tmp_path):
    """Run a config on its miniature data set; returns the run's folder and the samples' truth."""

    def run(config: str, *more: str, output: str = "run"):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["predict", "--config", config, "--print_config"])
        shown = yaml.safe_load(capsys.readouterr().out)
        task, data = (shown[field]["class_path"].rsplit(".", 1)[-1] for field in ("model", "data"))
        fields, model = shown["data"]["init_args"], shown["model"]["init_args"]
        words = ["predict", "--config", config, f"--model.backbone.model={tiny}"]
        words += ["--model.backbone.pretrained=null", "--trainer.accelerator=cpu"]
        words += ["--trainer.enable_progress_bar=false", "--data.num_workers=0"]
        words += [f"--writer.output={tmp_path / output}"]
        words.append(
            f"--data.image_size={'[48,96]' if isinstance(fields['image_size'], list) else 48}"
        )
        if model.get("tile"):
            words.append("--model.tile=24")
        if task == "Opinions":
            words += [f"--model.{field}" for field in BRIEF]
        if data == "Shapes":
            words += [f"--data.shards={tmp_path / 'scenes'}", "--data.scenes=2"]
            truth = {f"{i:08d}": None for i in range(2)}
        elif data == "Images":
            words += [f"--data.path={photos}"]
            words += [] if task == "Opinions" else ["--data.names=[cat, dog]"]
            truth = dict.fromkeys("01")
        else:
            shards, truth = official(data)
            words.append(f"--data.shards={shards}")
        assert main([*words, *more]) == 0
        return tmp_path / output, truth

    return run


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_image_has_its_result(name, experiment):
    run, truth = experiment(EXPERIMENTS[name], "--writer.layout=tar")
    summary = json.loads((run / "metrics.json").read_text())
    assert (summary["images"], summary["errors"]) == (len(truth), 0)
    records = {}
    for shard in run.glob("*.tar"):
        for file, data in members(shard).items():
            if file.endswith(".json") and not file.startswith("__shard__"):
                records[file.removesuffix(".json")] = json.loads(data)
    assert records.keys() == truth.keys()
    assert all(value is not None for value in summary["metrics"].values())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_image_can_be_drawn_at_its_aspect(name, experiment):
    words = [] if name == "cityscapes" else ["--data.resize=short_side"]  # it has one size
    run, truth = experiment(EXPERIMENTS[name], *DRAWN, *words)
    summary = json.loads((run / "metrics.json").read_text())
    assert (summary["images"], summary["errors"]) == (len(truth), 0)
    found = {path.stem for path in run.glob("*/*.json")}
    assert found >= truth.keys()
    for picture in run.glob("*/*.jpg"):
        Image.open(picture).load()


def scores_of(run) -> dict[str, np.ndarray]:
    return {
        name.removesuffix(".surgery.scores.npy"): np.load(io.BytesIO(data))
        for shard in sorted(run.glob("*.tar"))
        for name, data in members(shard).items()
        if name.endswith(".surgery.scores.npy")
    }


def test_void_pixels_are_background_or_nothing(experiment):
    measured, expected = [], []
    for void in ("ignore", "background"):
        run, truth = experiment("vit_b16_voc.yaml", f"--model.void={void}", output=void)
        classes: dict[int, list[float]] = {}
        for key, scores in scores_of(run).items():
            label = torch.from_numpy(truth[key].astype(np.int64))
            maps = torch.from_numpy(scores.astype(np.float32))
            low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
            maps = F.interpolate(((maps - low) / (high - low))[None], label.shape, mode="bilinear")
            for value in set(label.unique().tolist()) - {0, 255}:
                values, inside = maps[0, value - 1], label == value
                outside = ~inside & ((label != 255) | (void == "background"))
                contrast = values[inside].mean() - values[outside].mean()
                classes.setdefault(value, []).append(float(contrast))
        expected.append(np.mean([np.mean(values) for values in classes.values()]))
        measured.append(json.loads((run / "metrics.json").read_text())["metrics"])
    assert [m["mSC"] for m in measured] == pytest.approx(expected, abs=2e-5)
    assert abs(expected[0] - expected[1]) > 2e-4
    assert measured[0]["mIoU"] > measured[1]["mIoU"]  # void is never foreground


def test_background_is_a_class_only_where_it_is_asked_for(experiment):
    for name, asked in [("vit_b16_voc21.yaml", True), ("vit_b16_voc20.yaml", False)]:
        run, truth = experiment(name, output=name)
        summary = json.loads((run / "metrics.json").read_text())
        assert ("background" in summary["per_class"]) == asked
        pixels = sum(column["pixels"] for column in summary["per_class"].values())
        void = {255} if asked else {0, 255}
        assert pixels == sum((~np.isin(label, [*void])).sum() for label in truth.values())


def test_labels_of_16_bits_come_out_as_they_went_in(official, experiment, monkeypatch):
    monkeypatch.setitem(DATA_SETS, "ImageNetS300", fakes.fake_imagenet_s300)
    monkeypatch.setitem(NAMES, "ImageNetS300", "imagenet_s")
    shards, truth = official("ImageNetS300")
    run, _ = experiment("vit_b16_imagenet_s.yaml", f"--data.shards={shards}")
    values = set()
    for shard in run.glob("*.tar"):
        for name, data in members(shard).items():
            if name.endswith(".png"):
                values |= set(np.unique(np.asarray(Image.open(io.BytesIO(data)))).tolist())
    shown = set().union(*(np.unique(label).tolist() for label in truth.values()))
    assert values == shown - {65535}
    assert max(values) == 300


def test_an_image_without_any_class_has_no_mask_and_counts_for_nothing(experiment):
    run, truth = experiment("vit_b16_coco.yaml")
    bare = [key for key, masks in truth.items() if not masks]
    found = {name: data for shard in run.glob("*.tar") for name, data in members(shard).items()}
    for key in bare:
        assert json.loads(found[f"{key}.json"])["methods"]["surgery"]["labels"] == {}
        assert [n for n in found if n.startswith(key) and n.endswith(".png")] == []
        assert np.load(io.BytesIO(found[f"{key}.surgery.scores.npy"])).shape == (80, 6, 6)
    counted = json.loads((run / "metrics.json").read_text())["per_class"]
    assert sum(row["images"] for row in counted.values()) == sum(map(len, truth.values()))


def test_points_are_drawn_where_they_are_and_told_apart(experiment):
    run, _ = experiment("vit_b16_voc_interactive.yaml", *DRAWN)
    drawn = {1: 0, 0: 0}
    for path in run.glob("*/*.json"):
        record = json.loads(path.read_text())["methods"]["surgery"]
        texts = record["texts"]
        pictures = sorted(path.parent.glob(f"{path.stem}.surgery.points.*.jpg"))
        assert len(pictures) == len(texts)
        for picture, found in zip(pictures, texts.values(), strict=True):
            pixels = np.asarray(Image.open(picture)).astype(int)
            scale = pixels.shape[0] // record["size"][0]
            assert min(pixels.shape[:2]) >= 192
            for (x, y), positive in zip(found["points"], found["labels"], strict=True):
                red, green, _ = pixels[int((y + 0.5) * scale), int((x + 0.5) * scale)]
                assert (green > red + 80) if positive else (red > green + 80)
                drawn[positive] += 1
    assert min(drawn.values()) > 5


def test_the_colours_of_a_segmentation_are_explained_below_it(experiment):
    run, _ = experiment("vit_b16_voc20.yaml", *DRAWN)
    for picture in run.glob("*/*.label.jpg"):
        label = Image.open(picture.with_suffix(".png"))
        drawn = np.asarray(Image.open(picture))
        assert drawn.shape[1] == label.width
        below = drawn[label.height :]
        assert below.mean() > 128  # on white
        value = np.bincount(np.asarray(label).ravel()).argmax()
        colour = np.array(label.getpalette()).reshape(-1, 3)[value]
        assert np.abs(below.astype(int) - colour).sum(2).min() < 60
