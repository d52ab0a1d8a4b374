"""Multimodal visualisation through the command line, against open_clip's own text tower and numpy."""

import csv
import io
import json
from collections import Counter

import numpy as np
import open_clip
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from datamodules._drawing import draw_scene
from datamodules._samples import Batch, Sample
from datamodules.shapes import INFO
from surgery import load_backbone
from tasks import BackboneConfig, Multimodal
from tasks._draw import COLOURS, caption_strip
from tasks.measures.multimodal import MultimodalMeasures
from tests.tasks.conftest import members

END = 49407


@pytest.fixture(scope="module")
def run(predict, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "multimodal"
    return predict(folder, "--writer.overlays=true", task="Multimodal")


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pixels(index: int, backbone) -> torch.Tensor:
    """The scene as the loader gives it, normalised."""
    picture = Image.fromarray(draw_scene(5, index, 64).image)
    small = np.asarray(picture.resize((48, 48), Image.Resampling.BICUBIC)).copy()
    return backbone.preprocess(torch.from_numpy(small).permute(2, 0, 1)[None])


@torch.no_grad()
def expected(index: int, backbone) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Token ids of a scene's caption, their scores, and the best one's map."""
    model = backbone.model
    ids = open_clip.SimpleTokenizer()([draw_scene(5, index, 64).caption, ""])
    x = model.token_embedding(ids) + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask)) @ model.text_projection
    features = unit(x.numpy())
    length = int((ids[0] == END).nonzero()[0]) + 1
    image = pixels(index, backbone)
    scores = features[0, :length] @ unit(model.encode_image(image).numpy())[0]
    patches = unit(backbone.encode_image(image).patch_tokens[0].numpy())
    shown = patches @ (features[0, scores.argmax()] - features[1, 1])
    return ids[0, :length].tolist(), scores, shown.reshape(6, 6)


def test_tokens_scores_and_ranks(run, backbone):
    counts = [Counter(), Counter(), Counter()]
    for index in range(20):
        ids, scores, shown = expected(index, backbone)
        found = members(run / f"{index // 6:06d}.tar")
        record = json.loads(found[f"{index:08d}.json"])
        assert record["caption"] == draw_scene(5, index, 64).caption
        assert record["tokens"][0] == "[start]"
        assert record["tokens"][-1] == "[end]"
        spelled = "".join(word.removesuffix("-") for word in record["tokens"][1:-1])
        assert spelled == record["caption"].lower().replace(" ", "")
        assert record["scores"] == pytest.approx(scores.tolist(), abs=2e-5)
        assert sorted(record["ranks"]) == list(range(1, len(ids) + 1))
        order = np.argsort(record["ranks"])
        assert (np.diff(scores[order]) < 2e-5).all()
        assert record["best"] == record["tokens"][order[0]]
        assert not record["truncated"]
        stored = np.load(io.BytesIO(found[f"{index:08d}.map.npy"]))
        assert stored.dtype == np.float16
        if scores[order[0]] - scores[order[1]] > 1e-4:
            assert np.allclose(stored, shown, atol=2e-3)
        for rank, counter in enumerate(counts):
            counter[ids[order[rank]]] += 1
    summary = json.loads((run / "metrics.json").read_text())
    for name, counter in zip(("first", "second", "third"), counts, strict=True):
        assert summary["metrics"][f"end_{name}"] == pytest.approx(counter[END] / 20)
    assert summary["details"]["captions"] == 20
    rows = list(csv.DictReader((run / "tokens.csv").open()))
    listed = {row["token"]: int(row["first"]) for row in rows if int(row["first"])}
    assert sorted(listed.values()) == sorted(counts[0].values())


def test_the_table_of_a_shard(run):
    found = members(run / "000003.tar")
    table = pyarrow.parquet.read_table(
        io.BytesIO(next(v for k, v in found.items() if k.endswith(".parquet")))
    ).to_pylist()
    assert [row["key"] for row in table] == ["00000018", "00000019"]
    record = json.loads(found["00000018.json"])
    assert table[0] == {name: record[name] for name in table[0]}


def test_the_picture_has_coloured_tokens(run):
    picture = Image.open(io.BytesIO(members(run / "000000.tar")["00000000.caption.jpg"]))
    assert picture.width == 128
    assert picture.height > 64
    strip = caption_strip(["[start]", "trou-", "ser", "[end]"], [2, 0, 3], 400)
    assert strip.shape[1:] == (400, 3)
    for colour in COLOURS:
        assert (strip == colour).all(-1).any()
    assert caption_strip(["word"] * 60, [0], 400).shape[0] > 2 * strip.shape[0]


def test_without_subtraction(predict, backbone, tmp_path):
    plain = predict(tmp_path / "plain", "--model.redundant=false", task="Multimodal")
    found = members(plain / "000003.tar")
    record = json.loads(found["00000019.json"])
    stored = np.load(io.BytesIO(found["00000019.map.npy"]))
    ids = backbone.tokenizer([record["caption"]])
    best = record["ranks"].index(1)
    text = unit(backbone.encode_text_tokens(ids)[0, best].numpy())
    patches = unit(backbone.encode_image(pixels(19, backbone)).patch_tokens[0].numpy())
    assert np.allclose(stored.ravel(), patches @ text, atol=2e-3)


def test_missing_captions_and_images_of_several_sizes(tiny):
    task = Multimodal(BackboneConfig(str(tiny), None))
    task.backbone = load_backbone(str(tiny))
    task.configure_texts()
    task.draws = True
    task.measures = MultimodalMeasures.of(INFO, task.settings())
    images = [torch.zeros(3, 48, 48, dtype=torch.uint8), torch.zeros(3, 48, 64, dtype=torch.uint8)]
    samples = [
        Sample(f"k{i}", image, (96, 120), None, None, caption, {})
        for i, (image, caption) in enumerate(zip(images, (None, "word " * 100), strict=True))
    ]
    first, second = task.predict_step(Batch.collate("s", 0, 2, samples, []))
    assert first.record() == {"caption": None}
    record = second.record()
    assert record["truncated"]
    assert len(record["tokens"]) == 77
    assert record["tokens"][-1] == "[end]"
    assert second.results[2].files(INFO)["map.npy"].shape == (6, 8)
    assert second.draw()["caption.jpg"].shape[1] == 240
    assert task.measures.report().details["captions"] == 1
