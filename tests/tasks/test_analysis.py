"""The analyses through the command line, against the paper's in plain numpy over open_clip."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules._drawing import NOUNS, draw_scene
from surgery import encode_prompts
from tasks.__main__ import main
from tasks.reproduce import PLANS
from tasks.run import Run
from tests import reference_analyses as paper
from tests.tasks.conftest import members

GRID, HEADS, SIZE = (6, 6), 2, 64


@pytest.fixture(scope="module")
def run(predict, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "analysis"
    return predict(folder, "--writer.overlays=true", task="Analysis")


@pytest.fixture(scope="module")
def texts(backbone) -> np.ndarray:
    """Features of the nouns and of the empty text, [13, C]."""
    empty = backbone.encode_text(backbone.tokenizer([""]))
    return torch.cat([encode_prompts(backbone, backbone.tokenizer, NOUNS), empty]).numpy()


@pytest.fixture(scope="module")
def metrics(run) -> dict[str, float]:
    return json.loads((run / "metrics.json").read_text())["metrics"]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def labels(index: int) -> list[int]:
    """Classes of a scene, from 0."""
    return [int(v) - 1 for v in sorted(set(draw_scene(5, index, SIZE).label.ravel()) - {0})]


def pixels(index: int, backbone) -> torch.Tensor:
    picture = Image.fromarray(draw_scene(5, index, SIZE).image)
    small = np.asarray(picture.resize((48, 48), Image.Resampling.BICUBIC)).copy()
    return backbone.preprocess(torch.from_numpy(small).permute(2, 0, 1)[None])


@torch.no_grad()
def modules(index: int, backbone) -> tuple[np.ndarray, np.ndarray]:
    """What the last attention reads [1 + N, D], and all modules' class tokens [2 * blocks, D]."""
    visual = backbone.model.visual
    read, outputs, hooks = [], [], []
    for b in visual.transformer.resblocks:
        hooks += [
            b.ln_1.register_forward_hook(lambda m, a, y: read.append(y[0].numpy())),
            b.attn.register_forward_hook(lambda m, a, y: outputs.append(y[0][0, 0])),
            b.mlp.register_forward_hook(lambda m, a, y: outputs.append(y[0, 0])),
        ]
    visual(pixels(index, backbone))
    for hook in hooks:
        hook.remove()
    return read[-1], torch.stack(outputs).numpy()


def attention(x: np.ndarray, block, pair: str) -> np.ndarray:
    """Mean attention [1 + N, 1 + N] of a block that reads x."""
    weight, bias = block.attn.in_proj_weight.numpy(), block.attn.in_proj_bias.numpy()
    parts = dict(zip("qkv", np.split(x @ weight.T + bias, 3, axis=1), strict=True))
    asks, keys = (np.split(parts[p], HEADS, axis=1) for p in pair)
    logits = [a @ k.T / np.sqrt(a.shape[1]) for a, k in zip(asks, keys, strict=True)]
    powers = [np.exp(x - x.max(-1, keepdims=True)) for x in logits]
    return np.mean([p / p.sum(-1, keepdims=True) for p in powers], axis=0)


def similarities(index: int, backbone, texts, name: str) -> np.ndarray:
    """[N, 13] by a recipe."""
    tokens = backbone.with_attention(name).encode_image(pixels(index, backbone))
    return unit(tokens.patch_tokens[0].numpy()) @ unit(texts).T


def test_mfsr_is_that_of_eq_4(run, metrics, backbone, texts):
    block = backbone.model.visual.transformer.resblocks[-1]
    samples: dict[str, list[tuple[int, float]]] = {}
    for index in range(20):
        read, _ = modules(index, backbone)
        raw, consistent = (attention(read, block, pair) for pair in ("qk", "vv"))
        plain, reformed = (similarities(index, backbone, texts, n) for n in ("raw", "surgery"))
        for c in labels(index):
            shares = paper.cell_shares(draw_scene(5, index, SIZE).label == c + 1, GRID)
            for name, weights, scores in (
                ("raw", raw, plain),
                ("consistent", consistent, reformed),
                ("consistent_same_token", consistent, plain),
            ):
                value = paper.fsr(weights, scores[:, c], shares)
                samples.setdefault(name, []).append((c, value))
            samples.setdefault("blind", []).append((c, float(shares.mean())))
    for name, values in samples.items():
        assert metrics[f"mFSR_{name}"] == pytest.approx(paper.mfsr(values), abs=1e-5), name
    rows = list(csv.DictReader((run / "fsr_survival.csv").open()))
    thresholds = np.array([float(row["threshold"]) for row in rows])
    assert thresholds.tolist() == [round(i / 100, 2) for i in range(101)]
    for name in ("raw", "consistent", "consistent_same_token"):
        curve = [float(row[name]) for row in rows]
        # A sample may lie at a threshold but for its last digits.
        nearly = 1.5 / len(samples[name])
        assert curve == pytest.approx(paper.survival(samples[name], thresholds), abs=nearly)
        assert curve[0] == 1.0
        assert curve[-1] == 0.0


def test_affinity_is_that_of_eq_5(run, metrics, backbone, texts):
    visual = backbone.model.visual
    found, lines = {"": [], "_ln_post": []}, []
    for index in range(20):
        _, outputs = modules(index, backbone)
        normed = visual.ln_post(torch.from_numpy(outputs)).numpy()
        positive = labels(index)
        negative = [c for c in range(12) if c not in positive]
        for name, features in (("", outputs), ("_ln_post", normed)):
            projected = features @ visual.proj.numpy()
            found[name].append([paper.affinity(x, texts[positive]) for x in projected])
        final = backbone.encode_image(pixels(index, backbone)).class_token[0].numpy()
        lines.append([paper.affinity(final, texts[c]) for c in (positive, negative)])
    for name, values in found.items():
        expected = np.mean(values, axis=0)
        rows = list(csv.DictReader((run / f"affinity{name}.csv").open()))
        assert [int(row["module"]) for row in rows] == list(range(1, 15))
        points = [float(row["attention"] or row["ffn"]) for row in rows]
        assert points == pytest.approx(expected.tolist(), abs=1e-5)
        assert [bool(row["ffn"]) for row in rows] == [False, True] * 7
        assert metrics[f"affinity_last_ffn{name}"] == pytest.approx(expected[-1], abs=1e-5)
    positive, negative = np.mean(lines, axis=0)
    assert metrics["affinity_positive"] == pytest.approx(positive, abs=1e-5)
    assert metrics["affinity_negative"] == pytest.approx(negative, abs=1e-5)


def test_redundancy_is_that_of_fig_6(run, metrics, backbone, texts):
    for name, end in (("raw", ""), ("surgery", "_architecture")):
        rows: list[tuple[int, float, float]] = []
        for index in range(20):
            scores = similarities(index, backbone, texts, name)
            cells = np.stack([paper.min_max(column) for column in scores.T]).reshape(13, 1, *GRID)
            large = torch.nn.functional.interpolate(
                torch.from_numpy(cells), (SIZE, SIZE), mode="bilinear"
            )[:, 0].numpy()
            rows += [
                (c, paper.l1(large[c], large[12]), paper.l1(large[c], 0)) for c in labels(index)
            ]
        for i, kind in ((1, "empty"), (2, "zero")):
            expected = np.mean([row[i] for row in rows])
            assert metrics[f"redundancy_{kind}{end}"] == pytest.approx(expected, abs=1e-5)
        table = {row["maps of"]: row for row in csv.DictReader((run / "redundancy.csv").open())}
        stage = end.removeprefix("_") or "plain"
        found = float(table[stage]["to the empty text's map"])
        assert found == pytest.approx(np.mean([row[1] for row in rows]), abs=1e-5)


def test_every_image_has_its_numbers_and_pictures_and_every_table_its_plot(run, backbone, texts):
    files = members(run / "000000.tar")
    record = json.loads(files["00000000.json"])
    assert set(record["classes"]) == set(draw_scene(5, 0, SIZE).nouns)
    read, _ = modules(0, backbone)
    block = backbone.model.visual.transformer.resblocks[-1]
    for name, numbers in record["classes"].items():
        c = NOUNS.index(name)
        shares = paper.cell_shares(draw_scene(5, 0, SIZE).label == c + 1, GRID)
        plain = similarities(0, backbone, texts, "raw")[:, c]
        expected = paper.fsr(attention(read, block, "qk"), plain, shares)
        assert numbers["FSR_raw"] == pytest.approx(expected, abs=1e-5)
        for kind in ("attention", "redundant"):
            ending = f"{c:03d}-{name}"
            (file,) = [n for n in files if n.startswith(f"00000000.{kind}.{ending}")]
            assert file.endswith(".jpg")
    assert len(record["affinity"]["modules"]) == 14
    pytest.importorskip("matplotlib")
    for name in ("fsr_survival", "affinity", "affinity_ln_post", "redundancy"):
        with Image.open(run / f"{name}.png") as plot:
            assert plot.width > 500


def test_the_sheet_of_a_figure_has_a_column_a_part(run, tmp_path):
    pytest.importorskip("matplotlib")
    for name, aspect in (("figure4", 2), ("figure6", 4)):
        PLANS[name].sheet.draw(Run.load(run), tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.width / sheet.height == pytest.approx(aspect / 8, rel=0.15)


def test_flags_choose_the_analyses(predict, tmp_path):
    off = ("--model.selection=false", "--model.affinity=false")
    run = predict(tmp_path / "run", *off, task="Analysis")
    assert (run / "redundancy.csv").exists()
    assert not (run / "fsr_survival.csv").exists()
    record = json.loads(members(run / "000000.tar")["00000000.json"])
    assert set(record) == {"classes"}
    assert not any("FSR" in name for numbers in record["classes"].values() for name in numbers)


def test_images_without_a_positive_class_have_no_numbers(tmp_path, predict, scenes):
    shards = tmp_path / "shards"
    shards.mkdir()
    with (
        tarfile.open(scenes / "000000.tar") as whole,
        tarfile.open(shards / "000000.tar", "w") as empty,
    ):
        for member in whole:
            data = whole.extractfile(member).read()
            if member.name.endswith(".label.png"):
                buffer = io.BytesIO()
                Image.new("L", Image.open(io.BytesIO(data)).size).save(buffer, format="PNG")
                data = buffer.getvalue()
            member.size = len(data)
            empty.addfile(member, io.BytesIO(data))
    run = predict(tmp_path / "run", f"--data.shards={shards}", task="Analysis")
    summary = json.loads((run / "metrics.json").read_text())
    assert summary["images"] > 0
    assert summary["metrics"]["mFSR_raw"] is None
    assert summary["metrics"]["affinity_positive"] is None
    assert summary["metrics"]["redundancy_zero_architecture"] is None


def test_a_resnet_is_refused_at_once(command, tmp_path, capsys):
    model = Path(__file__).parents[1] / "surgery" / "reference" / "rn.json"
    words = command(tmp_path / "run", f"--model.backbone.model={model}", task="Analysis")
    assert main(words) == 1
    assert "ResNet" in capsys.readouterr().err
