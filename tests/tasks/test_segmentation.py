"""Segmentation over the drawn scenes: stored label maps against recomputations."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from common.errors import InvalidSetting
from datamodules._drawing import NOUNS
from datamodules._samples import DatasetInfo
from surgery import TEMPLATES, encode_prompts
from surgery.refine import pamr
from tasks import Segmentation
from tasks.__main__ import main
from tasks.measures.segmentation import truth_maps
from tests.tasks.conftest import members


def label_maps(folder: Path) -> dict[str, np.ndarray]:
    """Key -> the ``label.png`` of a folder of shards, input or output."""
    return {
        name.removesuffix(".label.png"): np.array(Image.open(io.BytesIO(data)))
        for path in sorted(folder.glob("*.tar"))
        for name, data in members(path).items()
        if name.endswith(".label.png")
    }


def summary(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def recomputed(run: Path, scenes: Path, values: range) -> tuple[float, float]:
    """mIoU and pixel accuracy over the label values that are classes, from the stored files."""
    predicted, truth = label_maps(run), label_maps(scenes)
    assert predicted.keys() == truth.keys()
    p = np.concatenate([predicted[k].ravel() for k in truth])
    t = np.concatenate([truth[k].ravel() for k in truth])
    p, t = p[np.isin(t, values)], t[np.isin(t, values)]
    unions = [((p == v) | (t == v)).sum() for v in values]
    hits = [((p == v) & (t == v)).sum() for v in values]
    ious = [hit / union for hit, union in zip(hits, unions, strict=True) if union]
    return float(np.mean(ious)), float(np.mean(p == t))


@pytest.fixture(scope="module")
def run(predict, tmp_path_factory) -> Path:
    return predict(tmp_path_factory.mktemp("runs") / "plain", task="Segmentation")


def pictured(scenes: Path, key: str, side: int) -> torch.Tensor:
    """One scene as uint8 [1,3,S,S], from its PNG."""
    data = {k: v for p in scenes.glob("*.tar") for k, v in members(p).items()}[f"{key}.png"]
    picture = Image.open(io.BytesIO(data)).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


def cosines(backbone, scenes: Path, key: str, words: list[str]) -> torch.Tensor:
    """[T,h,w] of one scene, computed from its PNG."""
    tokens = backbone.encode_image(backbone.preprocess(pictured(scenes, key, 48)))
    text = encode_prompts(backbone, backbone.tokenizer, words)
    return (F.normalize(tokens.patch_tokens, dim=-1) @ text.T)[0].T.unflatten(1, tokens.grid)


def test_metrics_are_those_of_the_stored_maps(run, scenes):
    iou, accuracy = recomputed(run, scenes, range(1, 13))
    report = summary(run)
    assert report["metrics"]["mIoU"] == pytest.approx(iou, abs=1e-12)
    assert report["metrics"]["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert list(report["per_class"]) == list(NOUNS)
    assert main(["metrics", str(run)]) == 0
    assert summary(run) == report


def test_the_map_is_the_argmax_of_enlarged_cosines(run, scenes, backbone):
    key = "00000003"
    stored = label_maps(run)[key]
    large = F.interpolate(
        cosines(backbone, scenes, key, list(NOUNS))[None], size=(64, 64), mode="bilinear"
    )
    assert (stored == large[0].argmax(0).numpy() + 1).mean() > 0.999
    record = json.loads(members(run / "000000.tar")[f"{key}.json"])
    assert record["labels"] == {
        name: pytest.approx((stored == i + 1).mean(), abs=1e-6)
        for i, name in enumerate(NOUNS)
        if (stored == i + 1).any()
    }


def test_batch_size_changes_nothing(run, predict, tmp_path):
    one = predict(tmp_path / "one", "--data.batch_size=1", task="Segmentation")
    maps, others = label_maps(run), label_maps(one)
    assert min((maps[k] == others[k]).mean() for k in maps) > 0.999


def test_palette_and_overlay(predict, tmp_path):
    run = predict(tmp_path / "run", "--writer.overlays=true", task="Segmentation")
    files = members(run / "000003.tar")
    key = next(n for n in files if n.endswith(".label.png"))
    assert Image.open(io.BytesIO(files[key])).getpalette()[3:6] == [230, 60, 60]
    width, height = Image.open(io.BytesIO(files[key.replace("png", "jpg")])).size
    assert width == 64
    assert height > 64  # a legend of the classes stands below


def test_background_words_and_probability(predict, scenes, backbone, tmp_path):
    words = [*NOUNS, "background", "nothing at all"]
    # The random network's probabilities are nearly equal; this one parts the pixels of a scene.
    probability = (40 * cosines(backbone, scenes, "00000003", words)).softmax(0).amax(0)
    threshold = float(probability.median())
    run = predict(
        tmp_path / "run",
        "--model.background=[background, nothing at all]",
        f"--model.prob_thd={threshold}",
        task="Segmentation",
    )
    iou, accuracy = recomputed(run, scenes, range(13))
    report = summary(run)
    assert report["metrics"]["mIoU"] == pytest.approx(iou, abs=1e-12)
    assert report["metrics"]["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert next(iter(report["per_class"])) == "background"

    large = F.interpolate(
        cosines(backbone, scenes, "00000003", words)[None], size=(64, 64), mode="bilinear"
    )[0]
    expected = large.argmax(0) + 1
    expected[(expected > 12) | ((40 * large).softmax(0).amax(0) < threshold)] = 0
    stored = label_maps(run)["00000003"]
    assert (stored == expected.numpy()).mean() > 0.999
    assert 0 < (stored == 0).mean() < 1


def test_post_steps_in_the_order_of_published_evaluations(predict, scenes, backbone, tmp_path):
    key, words = "00000012", [*NOUNS, "background"]
    run = predict(
        tmp_path / "run",
        *("--model.background=[background]", "--model.refine=pamr", "--model.area_thd=0.2"),
        *("--model.templates=openai", "--model.logit_scale=300", "--model.prob_thd=0.6"),
        *("--data.image_size=50", "--model.rest=drop", "--model.enlarge=twice"),
        task="Segmentation",
    )
    pixels = backbone.preprocess(pictured(scenes, key, 50))
    tokens = backbone.encode_image(pixels[..., :48, :48])
    text = encode_prompts(backbone, backbone.tokenizer, words, TEMPLATES[:80])
    maps = (F.normalize(tokens.patch_tokens, dim=-1) @ text.T).transpose(1, 2).unflatten(2, (6, 6))
    for size in (50, 64):
        maps = F.interpolate(maps, size=(size, size), mode="bilinear")
    likely = (300 * pamr(F.interpolate(pixels, size=(64, 64), mode="bilinear"), maps)).softmax(1)[0]
    found = likely.argmax(0)
    objects = torch.bincount(found[found < 12], minlength=13)
    small = objects[:12] <= 0.2 * objects.sum()
    assert objects[:12][small].sum() > 100
    likely[:12][small] = 0
    expected = (likely.argmax(0) + 1) * (likely.amax(0) >= 0.6) % 13
    assert (label_maps(run)[key] == expected.numpy()).mean() > 0.999
    assert len(expected.unique()) > 2


def test_a_small_object_needs_a_background_to_give_way_to(command, tmp_path, capsys):
    assert main(command(tmp_path, "--model.area_thd=0.1", task="Segmentation")) == 1
    assert "--data.background true" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--model.tile=32", "--data.image_size=64"],
        [
            "--model.window=48",
            "--model.stride=24",
            "--data.resize=short_side",
            "--data.image_size=80",
        ],
    ],
)
def test_tiles_and_windows(predict, scenes, tmp_path, options):
    run = predict(tmp_path / "run", *options, task="Segmentation")
    iou, _ = recomputed(run, scenes, range(1, 13))
    assert summary(run)["metrics"]["mIoU"] == pytest.approx(iou, abs=1e-12)
    record = json.loads(members(run / "000000.tar")["00000000.json"])
    assert record["views"] == (4 if "tile" in options[0] else 9)


def test_the_best_synonym_counts():
    info = DatasetInfo(
        name="x",
        classes=("a", "b"),
        background_words=("sky",),
        synonyms=(("sky", "wall"), ("a", "one"), ("b",)),
    )
    task = Segmentation()
    assert task.wording(info) == [(1, ("a", "one")), (2, ("b",)), (0, ("sky",))]
    assert task.words(info) == ["a", "one", "b", "sky"]
    assert Segmentation(background=[]).words(info) == ["a", "one", "b"]
    assert Segmentation(text_features="f").words(info) == ["a", "b", "sky"]


def test_one_mask_a_class_becomes_a_map():
    info = DatasetInfo(name="x", classes=("a", "b", "c"))
    masks = torch.tensor([[[1, 1, 0, 255, 0]], [[0, 1, 1, 0, 0]]], dtype=torch.uint8)
    assert truth_maps([masks], [(0, 2)], info)[0].tolist() == [[1, -1, 3, -1, 0]]
    empty = torch.zeros(0, 1, 2, dtype=torch.uint8)
    assert truth_maps([empty], [()], info)[0].tolist() == [[0, 0]]
    label = torch.tensor([[0, 3, 255]], dtype=torch.uint8)
    assert truth_maps([label], [()], info)[0].tolist() == [[0, 3, -1]]


@pytest.fixture(scope="module")
def features(backbone) -> torch.Tensor:
    return encode_prompts(backbone, backbone.tokenizer, list(NOUNS))


class TestTextFeatures:
    """``--model.text_features``, which every task has from its base."""

    def saved(self, path: Path, features: torch.Tensor, names: list[str] | None) -> str:
        metadata = None if names is None else {"names": json.dumps(names)}
        save_file({"features": features.contiguous()}, str(path), metadata)
        return f"--model.text_features={path}"

    def test_the_same_features_give_the_same_maps(self, features, run, predict, tmp_path):
        option = self.saved(tmp_path / "f.safetensors", 3 * features, None)
        found = label_maps(predict(tmp_path / "run", option, task="Segmentation"))
        expected = label_maps(run)
        assert min((found[k] == expected[k]).mean() for k in expected) > 0.999

    def test_rows_are_found_by_name(self, features, run, predict, tmp_path):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        names = [NOUNS[i].upper() for i in order.tolist()] + ["something else"]
        shuffled = torch.cat([features[order], features[:1]])
        option = self.saved(tmp_path / "f.safetensors", shuffled, names)
        found = label_maps(predict(tmp_path / "run", option, task="Segmentation"))
        assert min((found[k] == m).mean() for k, m in label_maps(run).items()) > 0.999

    def test_names_may_lie_beside(self, features, command, tmp_path, capsys):
        option = self.saved(tmp_path / "f.safetensors", features, None)
        (tmp_path / "f.json").write_text(json.dumps(["no noun", *NOUNS[1:]]))
        assert main(command(tmp_path / "run", option, task="Segmentation")) == 1
        assert "no feature named 'circle' (1 of 12 missing)" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("shape", "names", "message"),
        [
            ((11, 32), None, "has 11 text features, expected 12"),
            ((12, 31), None, "of another backbone"),
            ((12, 32), ["circle"], "1 names for 12"),
            ((12,), None, r"expected text features [T, C]"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, command, tmp_path, capsys, shape, names, message):
        option = self.saved(tmp_path / "f.safetensors", torch.ones(shape), names)
        assert main(command(tmp_path / "run", option, task="Segmentation")) == 1
        assert message in capsys.readouterr().err

    def test_a_file_that_is_not_there(self, command, tmp_path, capsys):
        option = f"--model.text_features={tmp_path / 'nowhere'}"
        assert main(command(tmp_path / "run", option, task="Segmentation")) == 1
        assert "no file of text features at" in capsys.readouterr().err

    def test_other_features_are_another_run(self, features, predict, command, tmp_path, capsys):
        option = self.saved(tmp_path / "f.safetensors", features, None)
        predict(tmp_path / "run", option, task="Segmentation")
        self.saved(tmp_path / "f.safetensors", features.flip(0), None)
        assert main(command(tmp_path / "run", option, task="Segmentation")) == 1
        assert "another run's results" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"tile": 4, "window": 4},
        {"stride": 2},
        {"window": 4, "stride": 5},
        {"prob_thd": 40.0},
        {"area_thd": 2.0},
        {"refine": "crf"},
        {"refine": "tlp", "refine_options": {"steps": 3}},
        {"templates": ["no place"]},
        {"templates": "opnai"},
    ],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(InvalidSetting, match=r"model|templates are surgery, openai"):
        Segmentation(**options)
