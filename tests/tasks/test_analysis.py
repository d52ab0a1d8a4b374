"""The analyses through the command line, against plain numpy over open_clip's own modules."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.shapes import NOUNS, draw_scene
from surgery import encode_prompts, load_backbone
from tasks.__main__ import main
from tests.tasks.conftest import members

GRID, HEADS = 6, 2


@pytest.fixture(scope="module")
def run(predict, tmp_path_factory):
    return predict(tmp_path_factory.mktemp("runs") / "analysis", task="Analysis")


@pytest.fixture(scope="module")
def backbone(tiny):
    return load_backbone(str(tiny))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def coverage(mask: np.ndarray) -> np.ndarray:
    """Share of each cell [GRID * GRID] that a mask [H,W] covers; cells may share pixels."""
    n = len(mask)
    edges = [(i * n // GRID, -(-(i + 1) * n // GRID)) for i in range(GRID)]
    return np.array([mask[a:b, c:d].mean() for a, b in edges for c, d in edges])


def pixels(index: int, backbone) -> torch.Tensor:
    picture = Image.fromarray(draw_scene(5, index, 64).image)
    small = np.asarray(picture.resize((48, 48), Image.Resampling.BICUBIC)).copy()
    return backbone.preprocess(torch.from_numpy(small).permute(2, 0, 1)[None])


@torch.no_grad()
def modules(index: int, backbone) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Inputs of every attention [1 + N, D], and the outputs of attention and FFN, by hooks."""
    blocks = backbone.model.visual.transformer.resblocks
    read, attended, fed = [], [], []
    hooks = [
        b.ln_1.register_forward_hook(lambda m, a, y: read.append(y[0].numpy())) for b in blocks
    ]
    hooks += [
        b.attn.register_forward_hook(lambda m, a, y: attended.append(y[0][0])) for b in blocks
    ]
    hooks += [b.mlp.register_forward_hook(lambda m, a, y: fed.append(y[0])) for b in blocks]
    visual = backbone.model.visual
    visual(pixels(index, backbone))
    for hook in hooks:
        hook.remove()
    projected = [
        [(visual.ln_post(x) @ visual.proj).numpy() for x in outputs] for outputs in (attended, fed)
    ]
    return read, projected


def attention(x: np.ndarray, block, pair: str) -> np.ndarray:
    """Mean attention [N, N] of patches to patches."""
    weight, bias = block.attn.in_proj_weight.numpy(), block.attn.in_proj_bias.numpy()
    parts = dict(zip("qkv", np.split(x @ weight.T + bias, 3, axis=1), strict=True))
    asks, keys = (np.split(parts[p], HEADS, axis=1) for p in pair)
    maps = [softmax(a @ k.T / np.sqrt(a.shape[1])) for a, k in zip(asks, keys, strict=True)]
    return np.mean(maps, axis=0)[1:, 1:]


def test_mfsr_equals_a_plain_numpy_computation(run, backbone):
    blocks = backbone.model.visual.transformer.resblocks
    ratios: dict[int, list[np.ndarray]] = {}
    for index in range(20):
        read, _ = modules(index, backbone)
        label = draw_scene(5, index, 64).label
        for value in sorted(set(label.ravel()) - {0}):
            own = coverage(label == value) >= 0.5
            if not 2 <= own.sum() < len(own):
                continue
            curve = []
            for x, block in zip(read, blocks, strict=True):
                for pair in ("qk", "vv"):
                    rows = attention(x, block, pair)[own]
                    curve.append((rows[:, own].sum(1) / rows.sum(1)).mean())
                    top = np.argsort(-rows, axis=1)[:, : own.sum()]
                    curve.append(own[top].mean())
            ratios.setdefault(value, []).append(np.array(curve).reshape(len(blocks), 2, 2))
    expected = np.mean([np.mean(values, axis=0) for values in ratios.values()], axis=0)
    rows = list(csv.DictReader((run / "mfsr_readings.csv").open()))
    assert [int(row["block"]) for row in rows] == list(range(1, 8))
    for i, row in enumerate(rows):
        for j, kind in enumerate(("raw", "consistent")):
            assert float(row[f"{kind}_weight"]) == pytest.approx(expected[i, j, 0], abs=1e-5)
            assert float(row[f"{kind}_top"]) == pytest.approx(expected[i, j, 1], abs=2e-3)
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    for j, kind in enumerate(("raw", "consistent")):
        assert metrics[f"mFSR_{kind}"] == pytest.approx(expected[:, j, 0].mean(), abs=1e-5)


def test_affinity_equals_a_plain_numpy_computation(run, backbone):
    text = encode_prompts(backbone, backbone.tokenizer, NOUNS).numpy()
    angles: dict[int, list[np.ndarray]] = {}
    for index in range(20):
        _, outputs = modules(index, backbone)
        for value in sorted(set(draw_scene(5, index, 64).label.ravel()) - {0}):
            cosines = np.array([[unit(x) @ text[value - 1] for x in each] for each in outputs])
            pair = np.stack([cosines[..., 0], cosines[..., 1:].mean(-1)], axis=-1)
            angles.setdefault(value, []).append(pair)
    expected = np.mean([np.mean(values, axis=0) for values in angles.values()], axis=0)
    for i, row in enumerate(csv.DictReader((run / "affinity.csv").open())):
        for j, module in enumerate(("attention", "ffn")):
            assert float(row[f"{module}_class"]) == pytest.approx(expected[j, i, 0], abs=1e-5)
            assert float(row[f"{module}_patches"]) == pytest.approx(expected[j, i, 1], abs=1e-5)


def test_redundancy_equals_a_plain_numpy_computation(run, backbone):
    text = encode_prompts(backbone, backbone.tokenizer, NOUNS).numpy()
    empty = unit(backbone.encode_text(backbone.tokenizer([""])).numpy())[0]
    likeness: dict[int, list[float]] = {}
    for index in range(20):
        patches = unit(backbone.encode_image(pixels(index, backbone)).patch_tokens[0].numpy())
        maps = [patches @ t for t in (*text, empty)]
        maps = [(m - m.min()) / np.ptp(m) for m in maps]
        for value in set(draw_scene(5, index, 64).label.ravel()) - {0}:
            cosine = unit(maps[value - 1]) @ unit(maps[-1])
            likeness.setdefault(int(value) - 1, []).append(float(cosine))
    summary = json.loads((run / "metrics.json").read_text())
    for i, values in likeness.items():
        found = summary["per_class"][NOUNS[i]]["cosine_plain"]
        assert found == pytest.approx(np.mean(values), abs=1e-4)
    mean = np.mean([np.mean(values) for values in likeness.values()])
    assert summary["metrics"]["redundancy_plain"] == pytest.approx(mean, abs=1e-4)


def test_every_image_has_its_numbers_and_every_table_its_plot(run):
    record = json.loads(members(run / "000000.tar")["00000000.json"])
    assert set(record) == set(draw_scene(5, 0, 64).nouns)
    for numbers in record.values():
        assert np.shape(numbers["selection"]) == (7, 2, 3)
        assert np.shape(numbers["affinity"]) == (7, 2, 2)
        assert np.shape(numbers["redundancy"]) == (2, 2)
    pytest.importorskip("matplotlib")
    for name in ("mfsr", "mfsr_readings", "affinity", "redundancy"):
        with Image.open(run / f"{name}.png") as plot:
            assert plot.width > 500


def test_flags_choose_the_analyses(predict, tmp_path):
    off = ("--model.selection=false", "--model.affinity=false")
    run = predict(tmp_path / "run", *off, task="Analysis")
    assert (run / "redundancy.csv").exists()
    assert not (run / "mfsr.csv").exists()
    record = json.loads(members(run / "000000.tar")["00000000.json"])
    assert all(set(numbers) == {"redundancy"} for numbers in record.values())


def test_a_resnet_is_refused_at_once(command, tmp_path, capsys):
    model = Path(__file__).parents[1] / "surgery" / "reference" / "rn.json"
    words = command(tmp_path / "run", f"--model.backbone.model={model}", task="Analysis")
    assert main(words) == 1
    assert "ResNet" in capsys.readouterr().err
