"""Recognition over the drawn scenes: stored tables against recomputations."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.shapes import NOUNS
from surgery import load_backbone
from tasks import Recognition
from tasks.__main__ import main
from tests.tasks.conftest import members, same_results

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def run(predict, tmp_path_factory) -> Path:
    return predict(tmp_path_factory.mktemp("runs") / "plain", task="Recognition")


def table(run: Path, name: str) -> tuple[list[str], np.ndarray]:
    """Keys, and scores [n,K], of all shards."""
    keys, parts = [], []
    for path in sorted(run.glob("*.tar")):
        read = parquet.read_table(io.BytesIO(members(path)[f"__shard__/{name}.parquet"]))
        assert read.column_names == ["key", *NOUNS]
        assert {str(f.type) for f in read.schema} == {"string", "float"}
        keys += read["key"].to_pylist()
        parts.append(np.stack([read[noun].to_numpy() for noun in NOUNS], axis=1))
    return keys, np.concatenate(parts)


def truth(scenes: Path, keys: list[str]) -> np.ndarray:
    files = {k: v for p in scenes.glob("*.tar") for k, v in members(p).items()}
    shown = np.zeros((len(keys), len(NOUNS)), bool)
    for i, key in enumerate(keys):
        shown[i, json.loads(files[f"{key}.json"])["positives"]] = True
    return shown


@pytest.mark.parametrize(
    ("name", "metric"),
    [("scores", "mAP"), ("scores_softmax", "mAP_softmax"), ("scores_cosine", "mAP_cosine")],
)
def test_map_is_that_of_the_stored_scores(run, scenes, name, metric):
    keys, scores = table(run, name)
    shown = truth(scenes, keys)
    expected = [
        np.mean([shown[scores[:, c] >= s, c].mean() for s in scores[shown[:, c], c]])
        for c in range(len(NOUNS))
        if shown[:, c].any()
    ]
    report = json.loads((run / "metrics.json").read_text())
    assert report["metrics"][metric] == pytest.approx(np.mean(expected), abs=1e-9)
    assert report["details"]["images_with_labels"] == len(keys) == 20
    without = [noun for noun, any_ in zip(NOUNS, shown.any(0), strict=True) if not any_]
    assert report["details"]["classes_without_positives"] == without
    assert all(report["per_class"][noun]["AP"] is None for noun in without)


def test_the_three_ways_by_their_formulas(run, tiny):
    backbone = load_backbone(str(tiny))
    (_, cosine), (_, softmax), (_, surgery) = (
        table(run, name) for name in ("scores_cosine", "scores_softmax", "scores")
    )
    power = np.exp(backbone.logit_scale * (cosine - cosine.max(1, keepdims=True)))
    np.testing.assert_allclose(softmax, power / power.sum(1, keepdims=True), atol=1e-5)
    weights = np.exp(2 * cosine)
    weights /= weights.mean(1, keepdims=True)
    expected = cosine - (weights * cosine).mean(1, keepdims=True)
    np.testing.assert_allclose(surgery, expected, atol=1e-6)


def test_metrics_again_and_a_resumed_run(run, predict, tmp_path):
    before = (run / "metrics.json").read_text()
    assert main(["metrics", str(run)]) == 0
    assert (run / "metrics.json").read_text() == before
    again = predict(tmp_path / "again", task="Recognition")
    (again / "000001.tar").unlink()
    predict(again, task="Recognition")
    assert same_results(run, again)


def test_what_each_form_does_to_rankings(tiny):
    """``paper`` moves whole images; ``code`` also stretches."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(30, 32, generator=generator)
    scores = {}
    for form in ("paper", "code"):
        task = Recognition(form=form)
        task.backbone = load_backbone(str(tiny))
        task.text = torch.nn.functional.normalize(
            torch.randn(9, 32, generator=torch.Generator().manual_seed(1)), dim=1
        )
        scores[form] = task.score(tokens)
    cosine, paper, code = scores["paper"]["cosine"], *(scores[f]["surgery"] for f in scores)
    moved = paper - cosine
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), rtol=0, atol=1e-6)
    assert not torch.equal(paper.argsort(0), cosine.argsort(0))
    gaps = (code.amax(1) - code.amin(1)) / (cosine.amax(1) - cosine.amin(1))
    assert gaps.std() > 0.01
    above = (cosine > -0.5).all(1)
    assert above.sum() > 10
    assert torch.equal(code.argsort(1)[above], cosine.argsort(1)[above])
    assert not torch.equal(code.argsort(0), paper.argsort(0))


def test_the_class_token_is_clips_own(run, predict, tmp_path):
    raw = predict(tmp_path / "raw", "--model.backbone.attention=raw", task="Recognition")
    np.testing.assert_allclose(
        table(raw, "scores_cosine")[1], table(run, "scores_cosine")[1], atol=1e-6
    )


def test_data_without_labels_is_refused_with_what_fits(tmp_path, capsys):
    (tmp_path / "own").mkdir()
    photo = tmp_path / "own" / "a.jpg"
    Image.new("RGB", (20, 20)).save(photo)
    words = ["predict", "--model=Recognition", "--data=Images", f"--data.path={photo.parent}"]
    more = ["--data.names=[cat, dog]", f"--writer.output={tmp_path / 'run'}"]
    assert main([*words, *more, "--trainer.accelerator=cpu"]) == 1
    message = capsys.readouterr().err
    assert "Recognition needs positives, which Images doesn't have" in message
    assert "Tasks that fit Images:" in message
    assert "Segmentation" in message.split("Tasks that fit Images:")[1]
    assert "NUSWide" in message.split("Data sets that fit Recognition:")[1]
