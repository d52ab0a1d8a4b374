"""Explainability through the real command line, against numbers computed here by other means."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules._drawing import NOUNS, draw_scene
from datamodules.shapes import INFO
from surgery import similarity_map
from surgery.visualize import colours
from tasks.__main__ import main
from tasks.run import Run, Similarities
from tests.tasks.conftest import TINY, members


def bilinear(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Enlarge [h,w] without corner alignment, in plain numpy."""

    def weights(small: int, large: int) -> np.ndarray:
        matrix = np.zeros((large, small))
        for i in range(large):
            at = min(max((i + 0.5) * small / large - 0.5, 0), small - 1)
            low = int(at)
            high = min(low + 1, small - 1)
            matrix[i, low] += 1 - (at - low)
            matrix[i, high] += at - low
        return matrix

    return weights(grid.shape[0], height) @ grid @ weights(grid.shape[1], width).T


def test_an_image_has_masks_scores_and_a_record(finished):
    found = members(finished / "000000.tar")
    scene = draw_scene(5, 0, 64)
    record = json.loads(found["00000000.json"])
    labels = record["methods"]["surgery"]["labels"]
    assert set(labels) == set(scene.nouns)
    assert record["size"] == [64, 64]
    scores = np.load(io.BytesIO(found["00000000.surgery.scores.npy"]), allow_pickle=False)
    assert scores.dtype == np.float16
    assert scores.shape == (12, 6, 6)
    for noun, file in labels.items():
        mask = Image.open(io.BytesIO(found[f"00000000.surgery.{file}"]))
        value = INFO.label_value(NOUNS.index(noun))
        assert mask.mode == "P"
        assert mask.size == (64, 64)
        assert mask.getpalette()[3 * value : 3 * value + 3] == list(INFO.palette[value - 1])
        grid = scores[NOUNS.index(noun)].astype(float)
        scaled = bilinear((grid - grid.min()) / (grid.max() - grid.min()), 64, 64)
        clear = np.abs(scaled - 0.5) > 0.02  # the stored scores are float16
        expected = np.where(scaled >= 0.5, value, 0)
        assert (np.asarray(mask) == expected)[clear].all()


def test_metrics_equal_a_plain_numpy_computation(finished):
    """Those of the order that was asked for, and of the paper's, which stand beside."""
    contrast: dict[int, list[float]] = {}
    beside: dict[int, list[float]] = {}
    maps: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for index in range(20):
        found = members(finished / f"{index // 6:06d}.tar")
        scores = np.load(io.BytesIO(found[f"{index:08d}.surgery.scores.npy"])).astype(float)
        label = draw_scene(5, index, 64).label
        for value in set(label.ravel()) - {0}:
            grid = scores[value - 1]
            scaled = bilinear((grid - grid.min()) / (grid.max() - grid.min()), 64, 64)
            truth = label == value
            contrast.setdefault(value, []).append(scaled[truth].mean() - scaled[~truth].mean())
            paper = (scaled - scaled.min()) / (scaled.max() - scaled.min())
            beside.setdefault(value, []).append(paper[truth].mean() - paper[~truth].mean())
            maps.setdefault(value, []).append((scaled, truth))
    expected, paper = (
        np.mean([np.mean(values) for values in of.values()]) for of in (contrast, beside)
    )

    def mean_iou(threshold: float) -> float:
        ious = []
        for pairs in maps.values():
            hits = sum(((m >= threshold) & t).sum() for m, t in pairs)
            union = sum(((m >= threshold) | t).sum() for m, t in pairs)
            ious.append(hits / union)
        return float(np.mean(ious))

    summary = json.loads((finished / "metrics.json").read_text())
    assert summary["images"] == 20
    assert summary["errors"] == 0
    assert summary["metrics"]["mSC"] == pytest.approx(expected, abs=2e-3)
    gained = summary["metrics"]["mSC_order_paper"] - summary["metrics"]["mSC"]
    assert gained == pytest.approx(paper - expected, rel=0.2)
    best = max(mean_iou(t / 256) for t in range(256))
    assert summary["metrics"]["mIoU"] == pytest.approx(best, abs=2e-3)
    assert summary["details"]["mIoU_all_foreground"] == pytest.approx(mean_iou(0.0), abs=1e-9)
    present = {name for name, row in summary["per_class"].items() if row["images"]}
    assert present == {NOUNS[value - 1] for value in contrast}


def test_masks_do_not_depend_on_the_batch_size(finished, predict, tmp_path):
    one = predict(tmp_path / "one", "--data.batch_size=1")
    for name in ("000000.tar", "000003.tar"):
        here, there = members(finished / name), members(one / name)
        masks = [file for file in here if ".mask." in file]
        assert masks
        for file in masks:
            a, b = (np.asarray(Image.open(io.BytesIO(f[file]))) for f in (here, there))
            assert (a != b).mean() < 1e-3  # another batch size rounds differently


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_halves_give_nearly_the_same_numbers(precision, finished, predict, tmp_path):
    halves = predict(tmp_path / "run", f"--trainer.precision={precision}")
    numbers = [
        json.loads((run / "metrics.json").read_text())["metrics"] for run in (finished, halves)
    ]
    for name, value in numbers[0].items():
        assert numbers[1][name] == pytest.approx(value, abs=0.03)


def test_overlays_and_plain_files(predict, tmp_path):
    """Pictures of the first five images of a shard, plain files."""
    run = predict(tmp_path / "files", "--writer.layout=files", "--writer.overlays=5")
    for shard, keys in (("000000", range(5)), ("000003", (18, 19))):
        drawn = {path.name.partition(".")[0] for path in (run / shard).glob("*.jpg")}
        assert drawn == {f"{key:08d}" for key in keys}
    pictures = sorted((run / "000000").glob("00000000.surgery.map.*.jpg"))
    masks = sorted((run / "000000").glob("00000000.surgery.mask.*.png"))
    assert len(pictures) == len(masks) == len(draw_scene(5, 0, 64).nouns)
    assert Image.open(pictures[0]).size == (64, 64)


def test_overlays_of_the_best_classes_in_other_colours(predict, command, scenes, tmp_path, capsys):
    few = f"--data.shards={scenes}/000003.tar"
    how = ["overlays=true", "overlay_classes=2", "overlay_colours=viridis", "overlay_alpha=1"]
    run = predict(tmp_path / "run", few, *(f"--writer.{word}" for word in how))
    for image in Run.load(run).images():
        values = torch.from_numpy(image.get(Similarities).values).float()
        best = values.amax((1, 2)).argsort(descending=True, stable=True)[:2]
        drawn = {int(name.split(".")[2][:3]): data for name, data in image.pictures.items()}
        assert {*drawn} == {*best.tolist()}
        size = image.record["size"]
        maps = similarity_map(values.flatten(1).T[None], values.shape[1:], size)[0]
        for index, data in drawn.items():
            picture = np.asarray(Image.open(io.BytesIO(data))).astype(int)
            assert np.abs(picture - colours(maps[index], "viridis").numpy()).mean() < 4
    assert main(command(run, few, "--writer.overlays=true")) == 1
    assert "--writer.overlays" in capsys.readouterr().err


def test_void_pixels_can_count_as_background(predict, tmp_path):
    numbers = [
        json.loads((predict(tmp_path / v, f"--model.void={v}") / "metrics.json").read_text())
        for v in ("ignore", "background")
    ]
    assert numbers[0]["metrics"] == numbers[1]["metrics"]  # the drawn world has no void


def test_every_method_is_measured_and_written_under_its_name(finished, predict, tmp_path):
    words = ["--model.methods=[clip, surgery, rclip]", "--writer.overlays=true"]
    run = predict(tmp_path / "three", *words)
    raw = predict(
        tmp_path / "raw", "--model.backbone.attention=raw", "--model.feature_surgery=none"
    )
    found, plain, usual = (
        json.loads((r / "metrics.json").read_text()) for r in (run, raw, finished)
    )
    assert list(found["methods"]) == ["clip", "surgery", "rclip"]
    assert found["metrics"] == found["methods"]["clip"] == plain["metrics"]
    assert found["methods"]["surgery"] == usual["metrics"] == usual["methods"]["surgery"]
    assert found["details"]["methods"]["surgery"] == usual["details"]
    for noun, row in usual["per_class"].items():
        assert found["per_class"][noun]["surgery.IoU"] == row["IoU"]
        assert found["per_class"][noun]["images"] == row["images"]
    files, single, unreformed = (members(r / "000000.tar") for r in (run, finished, raw))
    for name, data in single.items():
        if name.endswith((".npy", ".png")):
            assert files[name] == data
    for name, data in unreformed.items():
        if name.endswith((".npy", ".png")):
            assert files[name.replace(".surgery.", ".clip.")] == data
    scores = [np.load(io.BytesIO(files[f"00000000.{m}.scores.npy"])) for m in ("clip", "rclip")]
    assert np.array_equal(scores[0], -scores[1])
    pictures = [name for name in files if name.endswith(".jpg")]
    assert {name.split(".")[1] for name in pictures} == {"clip", "surgery", "rclip"}


def test_methods_with_gradients_beside_surgery(predict, scenes, tmp_path):
    """Inside of Lightning's inference mode and under autocast; batches of 3 and of 4 agree."""
    names = ["surgery", "grad_cam", "gscorecam", "bi_modal", "plrp", "legrad", "grad_eclip"]
    words = [f"--model.methods=[{', '.join(names)}]", "--trainer.precision=bf16-mixed"]
    words += [f"--data.shards={scenes}/000000.tar"]
    one, other = (
        predict(tmp_path / str(size), *words, f"--data.batch_size={size}") for size in (3, 4)
    )
    found = json.loads((one / "metrics.json").read_text())
    assert list(found["methods"]) == names
    assert len({method["mSC"] for method in found["methods"].values()}) == len(names)
    files, others = members(one / "000000.tar"), members(other / "000000.tar")
    for name in names[1:]:
        maps, same = (
            np.load(io.BytesIO(f[f"00000000.{name}.scores.npy"])) for f in (files, others)
        )
        assert maps.dtype == np.float32
        assert np.abs(maps).max() > 0
        np.testing.assert_allclose(maps, same, rtol=0, atol=1e-4 * np.abs(maps).max())


def test_methods_that_are_not_defined_for_the_network(command, tmp_path, capsys):
    model = tmp_path / "rn.json"
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    model.write_text(json.dumps({**TINY, "vision_cfg": vision}))
    words = [f"--model.backbone.model={model}", "--model.methods=[surgery, legrad]"]
    assert main(command(tmp_path / "run", *words)) != 0
    assert "method 'legrad' is defined for a ViT" in capsys.readouterr().err


def test_methods_that_there_are_not(command, tmp_path, capsys):
    for methods, message in (
        ("[surgerey]", "did you mean 'surgery'"),
        ("[clip, clip]", "different ones of surgery, "),
        ("[]", "different ones of surgery, "),
    ):
        assert main(command(tmp_path / "run", f"--model.methods={methods}")) != 0
        assert message in capsys.readouterr().err


def test_jpegs_that_are_decoded_where_the_model_is(command, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(3):
        scene = Image.fromarray(draw_scene(5, index, 64).image).resize((80, 70))
        scene.save(photos / f"{index}.{'png' if index == 1 else 'jpg'}", quality=95)
    found = {}
    for decoder in ("pillow", "torchcodec"):
        data = ["--data=Images", f"--data.path={photos}", "--data.names=[circle, star]"]
        how = [f"--data.decoder={decoder}", "--writer.overlays=true"]
        assert main(command(tmp_path / decoder, *data, *how)) == 0
        found[decoder] = members(tmp_path / decoder / "images-00000.tar")
    theirs, ours = found.values()
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith(".npy"):
            a, b = (np.load(io.BytesIO(f[name])).astype(float) for f in (ours, theirs))
            assert np.abs(a - b).max() < 0.05 * np.abs(b).max()
        if name.endswith(".jpg"):
            assert Image.open(io.BytesIO(ours[name])).size == (80, 70)
    assert sum(name.endswith(".jpg") for name in ours) >= 3


def test_long_names_of_methods_stand_apart(predict, tmp_path, capsys):
    methods = ["surgery", "surgery_paper", "architecture"]
    run = predict(tmp_path / "run", f"--model.methods=[{','.join(methods)}]")
    lines = capsys.readouterr().out.splitlines()
    assert methods in [line.split() for line in lines]
    found = json.loads((run / "metrics.json").read_text())["methods"]
    row = next(line for line in lines if line.split()[:1] == ["mIoU"])
    assert [float(cell) for cell in row.split()[1::2]] == [
        pytest.approx(100 * found[m]["mIoU"], abs=0.006) for m in methods
    ]
