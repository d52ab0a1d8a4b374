"""Interactive segmentation over the drawn scenes, with and without a tiny random SAM."""

import io
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules._samples import DatasetInfo
from tasks.__main__ import main
from tasks.interactive import texts_of
from tests.tasks.conftest import members
from tests.tasks.test_segmentation import label_maps, summary


@pytest.fixture(scope="module")
def run(predict, tmp_path_factory) -> Path:
    return predict(tmp_path_factory.mktemp("runs") / "plain", task="Interactive")


def records(run: Path, method: str = "surgery") -> dict[str, dict]:
    """Key -> what a method says of the image."""
    return {
        name.removesuffix(".json"): json.loads(data)["methods"][method]
        for path in sorted(run.glob("*.tar"))
        for name, data in members(path).items()
        if name.endswith(".json") and not name.startswith("__")
    }


def test_accuracy_is_that_of_the_stored_points(run, scenes):
    from datamodules._drawing import NOUNS

    maps, right = label_maps(scenes), {}
    for key, record in records(run).items():
        shown = {NOUNS[v - 1] for v in np.unique(maps[key]) if v}
        assert set(record["texts"]) == shown
        for name, entry in record["texts"].items():
            assert len(entry["points"]) == len(entry["labels"]) > 0
            for (x, y), label in zip(entry["points"], entry["labels"], strict=True):
                hit = (maps[key][y, x] == NOUNS.index(name) + 1) == label
                right.setdefault(name, []).append(hit)
    micro = np.mean([hit for hits in right.values() for hit in hits])
    macro = np.mean([np.mean(hits) for hits in right.values()])
    metrics = summary(run)["metrics"]
    assert metrics["point_accuracy"] == pytest.approx(micro, abs=1e-12)
    assert metrics["point_accuracy_over_classes"] == pytest.approx(macro, abs=1e-12)


def test_points_of_the_whole_map_are_measured_beside_those_of_the_half(run, predict, tmp_path):
    whole = predict(tmp_path / "run", "--model.down_sample=1", task="Interactive")
    half, other = summary(run)["metrics"], summary(whole)["metrics"]
    assert half["point_accuracy"] != other["point_accuracy"]
    for end in ("", "_over_classes"):
        assert half[f"point_accuracy_down_sample_1{end}"] == other[f"point_accuracy{end}"]
        assert other[f"point_accuracy_down_sample_2{end}"] == half[f"point_accuracy{end}"]


def test_a_text_is_compared_with_the_empty_one(run, tiny, scenes):
    from surgery import encode_prompts, feature_surgery, load_backbone, similarity_to_points

    backbone = load_backbone(str(tiny))
    data = {k: v for p in scenes.glob("*.tar") for k, v in members(p).items()}["00000002.png"]
    picture = Image.open(io.BytesIO(data)).resize((48, 48), Image.Resampling.BICUBIC)
    tokens = backbone.encode_image(
        backbone.preprocess(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])
    )
    empty = backbone.encode_text(backbone.tokenizer([""]))
    for name, entry in records(run)["00000002"]["texts"].items():
        text = encode_prompts(backbone, backbone.tokenizer, [name])
        scores = feature_surgery(tokens.patch_tokens, tokens.class_token, text, redundant=empty)
        points, labels = similarity_to_points(scores[0, :, 0], tokens.grid, (64, 64))
        assert entry == {"points": points.tolist(), "labels": labels.tolist()}


def test_methods_beside_each_other(run, predict, tiny, scenes, tmp_path):
    from surgery import explain, load_backbone, similarity_to_points
    from surgery.prompts import encode_prompts

    both = predict(tmp_path / "run", "--model.methods=[surgery, clip]", task="Interactive")
    assert records(both) == records(run)
    report = summary(both)
    assert report["metrics"] == summary(run)["metrics"] == report["methods"]["surgery"]
    assert 0 < report["methods"]["clip"]["point_accuracy"] < 1
    backbone = load_backbone(str(tiny))
    data = {k: v for p in scenes.glob("*.tar") for k, v in members(p).items()}["00000002.png"]
    picture = Image.open(io.BytesIO(data)).resize((48, 48), Image.Resampling.BICUBIC)
    pixels = backbone.preprocess(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])
    for name, entry in records(both, "clip")["00000002"]["texts"].items():
        text = encode_prompts(backbone, backbone.tokenizer, [name])
        scores = explain(backbone, pixels, text, method="clip")[0, 0]
        points, labels = similarity_to_points(scores.flatten(), (6, 6), (64, 64))
        assert entry == {"points": points.tolist(), "labels": labels.tolist()}


def test_joined_texts(predict, tmp_path):
    names = "circle+square,square,triangle,star,heart,cross,ring,moon,arrow,flower,fish,tree"
    run = predict(tmp_path / "run", f"--data.names={names}", task="Interactive")
    assert any("circle" in record["texts"] for record in records(run).values())
    info = DatasetInfo(name="x", classes=("both", "one"), prompts=("person + bench", "cat"))
    assert texts_of(info) == [["person", "bench"], ["cat"]]


def sam_folder(folder: Path, kind: str) -> Path:
    """A tiny random SAM or SAM 2 for pictures of 64 pixels, from its config."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    side = {"height": 64, "width": 64}
    decoder = {
        "hidden_size": 32,
        "mlp_dim": 32,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 32,
    }
    if kind == "sam":
        config = transformers.SamConfig(
            vision_config={
                "hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "image_size": 64, "patch_size": 8, "window_size": 4,
                "global_attn_indexes": [1], "mlp_dim": 64, "num_pos_feats": 16,
            },
            prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 8},
            mask_decoder_config=decoder | {"iou_head_depth": 2},
        )  # fmt: skip
        transformers.SamModel(config).save_pretrained(folder)
        images = transformers.SamImageProcessor(
            size={"longest_edge": 64}, pad_size=side, mask_size={"longest_edge": 32}
        )
        transformers.SamProcessor(images).save_pretrained(folder)
    else:
        backbone = transformers.Sam2HieraDetConfig(
            hidden_size=16, image_size=[64, 64], blocks_per_stage=[1, 1, 2, 1],
            embed_dim_per_stage=[16, 32, 64, 128], num_attention_heads_per_stage=[1, 1, 1, 1],
            window_size_per_stage=[8, 4, 4, 2], global_attention_blocks=[3],
        )  # fmt: skip
        vision = transformers.Sam2VisionConfig(
            backbone_config=backbone,
            backbone_channel_list=[128, 64, 32, 16],
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
            fpn_hidden_size=32,
        )
        prompt = {"hidden_size": 32, "image_size": 64, "patch_size": 16}
        config = transformers.Sam2Config(
            vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
        )
        transformers.Sam2Model(config).save_pretrained(folder)
        # Before release 5 it was called so.
        name = "Sam2ImageProcessor"
        make = getattr(transformers, name, None) or getattr(transformers, f"{name}Fast")
        images = make(size=side, mask_size={"height": 16, "width": 16})
        transformers.Sam2Processor(images, target_size=64).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_masks_of_a_tiny_sam(predict, scenes, run, tmp_path, kind):
    from datamodules._drawing import NOUNS
    from tasks._sam import PointSegmenter

    folder = sam_folder(tmp_path / kind, kind)
    with_masks = predict(tmp_path / "run", f"--model.sam={folder}", task="Interactive")
    files = {k: v for p in with_masks.glob("*.tar") for k, v in members(p).items()}
    truth, plain = label_maps(scenes), records(run)
    hits, unions = np.zeros(12), np.zeros(12)
    for key, record in records(with_masks).items():
        for name, entry in record["texts"].items():
            assert entry["points"] == plain[key]["texts"][name]["points"]
            value = NOUNS.index(name) + 1
            mask = np.array(Image.open(io.BytesIO(files[f"{key}.surgery.{entry['mask']}"])))
            assert set(np.unique(mask)) <= {0, value}
            hits[value - 1] += ((mask == value) & (truth[key] == value)).sum()
            unions[value - 1] += ((mask == value) | (truth[key] == value)).sum()
    report = summary(with_masks)
    expected = np.mean(hits[unions > 0] / unions[unions > 0])
    assert report["metrics"]["mIoU"] == pytest.approx(expected, abs=1e-12)
    assert report["metrics"]["point_accuracy"] == summary(run)["metrics"]["point_accuracy"]

    # One encoding for all prompts gives what each gets by itself through the plain interface.
    segmenter = PointSegmenter(str(folder))
    kept = json.loads((with_masks / "run.json").read_text())
    assert kept["identity"]["sam"] == segmenter.fingerprint()
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    prompts = [
        (torch.tensor([[5, 6], [30, 20], [49, 39]]), torch.tensor([1, 1, 0])),
        (torch.tensor([[40, 3]]), torch.tensor([1])),
    ]
    with torch.inference_mode():
        together = segmenter(image, prompts)
        for (points, labels), (mask, score) in zip(prompts, together, strict=True):
            inputs = segmenter.processor(
                images=image.permute(1, 2, 0).numpy(),
                input_points=[[points.tolist()]],
                input_labels=[[labels.tolist()]],
                return_tensors="pt",
            )
            found = segmenter.model(
                **{k: inputs[k] for k in ("pixel_values", "input_points", "input_labels")}
            )
            best = int(found.iou_scores.argmax())
            assert score == pytest.approx(float(found.iou_scores[0, 0, best]), abs=1e-5)
            sizes = {k: v for k, v in inputs.items() if k.endswith("_sizes")}
            masks = segmenter.processor.post_process_masks(found.pred_masks, **sizes)[0]
            assert mask.shape == (40, 50)
            assert (mask == masks[0, best]).float().mean() > 0.999


def test_without_the_extra_the_message_says_what_to_install(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("tasks._sam.find_spec", lambda name: None)
    assert (
        main(command(tmp_path / "run", "--model.sam=facebook/sam-vit-base", task="Interactive"))
        == 1
    )
    assert "pip install clip-surgery-lightning[sam]" in capsys.readouterr().err


def test_sam_that_cannot_be_fetched_is_told_in_a_sentence(command, tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")

    def fail(name):
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise OSError("no route to host\nsee the manual")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    words = command(tmp_path / "run", "--model.sam=facebook/sam-vit-base", task="Interactive")
    assert main(words) == 1
    (told,) = [
        line for line in capsys.readouterr().err.splitlines() if "random weights" not in line
    ]
    assert "--model.sam facebook/sam-vit-base failed (OSError: no route to host see" in told
    assert "give a folder with SAM's weights" in told


def test_a_folder_that_is_no_sam(command, tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "clip"}')
    option = f"--model.sam={tmp_path / 'model'}"
    assert main(command(tmp_path / "run", option, task="Interactive")) == 1
    assert "expected one of sam" in capsys.readouterr().err
