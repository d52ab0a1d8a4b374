"""Recognition over the drawn scenes: stored tables against recomputations."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from datamodules._drawing import NOUNS, draw_scene
from surgery import load_backbone
from surgery.features import prediction_surgery
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
    [
        ("scores", "mAP"),
        ("scores_paper", "mAP_paper"),
        ("scores_softmax", "mAP_softmax"),
        ("scores_cosine", "mAP_cosine"),
    ],
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


def test_all_ways_by_their_formulas(run, tiny):
    backbone = load_backbone(str(tiny))
    cosine, softmax, code, paper = (
        table(run, name)[1]
        for name in ("scores_cosine", "scores_softmax", "scores", "scores_paper")
    )
    power = np.exp(backbone.logit_scale * (cosine - cosine.max(1, keepdims=True)))
    np.testing.assert_allclose(softmax, power / power.sum(1, keepdims=True), atol=1e-5)
    weights = np.exp(2 * cosine)
    weights /= weights.mean(1, keepdims=True)
    shared = (weights * cosine).mean(1, keepdims=True)
    np.testing.assert_allclose(paper, cosine - shared, atol=1e-6)
    np.testing.assert_allclose(code, weights * cosine - shared, atol=1e-6)


def test_metrics_again_and_a_resumed_run(run, predict, tmp_path):
    before = (run / "metrics.json").read_text()
    assert main(["metrics", str(run)]) == 0
    assert (run / "metrics.json").read_text() == before
    again = predict(tmp_path / "again", task="Recognition")
    (again / "000001.tar").unlink()
    predict(again, task="Recognition")
    assert same_results(run, again)


def test_the_other_form_by_a_flag(run, predict, tmp_path):
    """Either is the task's own on request, and the other one stands beside; so does the record of it."""
    other = predict(tmp_path / "run", "--model.form=paper", task="Recognition")
    reports = [json.loads((folder / "metrics.json").read_text()) for folder in (run, other)]
    assert [report["details"]["form"] for report in reports] == ["code", "paper"]
    code, paper = (report["metrics"] for report in reports)
    assert (code["mAP"], code["mAP_paper"]) == (paper["mAP_code"], paper["mAP"])
    np.testing.assert_array_equal(table(other, "scores")[1], table(run, "scores_paper")[1])


def test_what_each_form_does_to_rankings():
    """``paper`` moves whole images; ``code`` also stretches."""
    generator = torch.Generator().manual_seed(0)
    cosine = torch.rand(30, 9, generator=generator) * 1.6 - 0.8
    paper, code = (prediction_surgery(cosine, form=form) for form in ("paper", "code"))
    moved = paper - cosine
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), rtol=0, atol=1e-6)
    assert not torch.equal(paper.argsort(0), cosine.argsort(0))
    gaps = (code.amax(1) - code.amin(1)) / (cosine.amax(1) - cosine.amin(1))
    assert gaps.std() > 0.01
    above = (cosine > -0.5).all(1)
    assert above.any()
    assert torch.equal(code.argsort(1)[above], cosine.argsort(1)[above])
    assert not torch.equal(code.argsort(0), paper.argsort(0))


@pytest.fixture
def learned(tmp_path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Two sets of features of the nouns, and the options that plug them in."""
    generator = torch.Generator().manual_seed(3)
    features = {name: torch.randn(12, 32, generator=generator) for name in ("text", "local_text")}
    options = []
    for name, values in features.items():
        path = tmp_path / f"{name}.safetensors"
        save_file({"features": values}, path, {"names": json.dumps(NOUNS)})
        options.append(f"--model.{name}_features={path}")
    return features, options


def test_tai_dpts_predictions_are_merged_and_feature_surgery_applies_to_them(
    predict, tmp_path, tiny, learned
):
    features, options = learned
    run = predict(
        tmp_path / "run", "--model.backbone.attention=maskclip", *options, task="Recognition"
    )
    _, merged = table(run, "scores_cosine")
    backbone = load_backbone(str(tiny), attention="maskclip")
    unit = torch.nn.functional.normalize
    for index in (0, 7):
        picture = Image.fromarray(draw_scene(5, index, 64).image)
        small = np.asarray(picture.resize((48, 48), Image.Resampling.BICUBIC)).copy()
        pixels = backbone.preprocess(torch.from_numpy(small).permute(2, 0, 1)[None])
        tokens = backbone.encode_image(pixels)
        whole = unit(tokens.class_token[0], dim=0) @ unit(features["text"], dim=1).T
        places = unit(tokens.patch_tokens[0], dim=1) @ unit(features["local_text"], dim=1).T
        local = (places * (50 * places).softmax(0)).sum(0)
        np.testing.assert_allclose(merged[index], (0.5 * whole + 0.5 * local).numpy(), atol=1e-5)
    weights = np.exp(2 * merged)
    weights /= weights.mean(1, keepdims=True)
    weighted = weights * merged
    expected = weighted - weighted.mean(1, keepdims=True)
    np.testing.assert_allclose(table(run, "scores")[1], expected, atol=1e-6)


def test_other_learned_texts_under_the_same_name_are_another_run(
    command, tmp_path, learned, capsys
):
    features, (text, local) = learned
    words = command(tmp_path / "run", text, local, task="Recognition")
    assert main(words) == 0
    (tmp_path / "run" / "000001.tar").unlink()
    path = local.split("=")[1]
    save_file({"features": features["local_text"].flip(1)}, path, {"names": json.dumps(NOUNS)})
    assert main(words) == 1
    assert "the features in the file" in capsys.readouterr().err


def test_learned_texts_that_do_not_fit_are_refused(command, tmp_path, learned, capsys):
    _, (text, local) = learned
    assert main(command(tmp_path / "run", local, task="Recognition")) == 1
    assert "give both" in capsys.readouterr().err
    path = local.split("=")[1]
    save_file({"features": torch.ones(12, 16)}, path)
    assert main(command(tmp_path / "run", text, local, task="Recognition")) == 1
    said = capsys.readouterr().err
    assert path in said
    assert "16 channels" in said


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
