"""Where models and weights come from: names, configs, downloads."""

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import open_clip
import pytest
import torch

from common.errors import UserError
from surgery import load_backbone
from surgery.checkpoints import CheckpointError
from surgery.sources import download, load_tokenizer


def test_images_of_a_file_of_weights_are_normalised_as_those_of_the_published(
    weights, folder, tmp_path, monkeypatch
):
    config = json.loads((folder / "vit.json").read_text())
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    torch.save(weights, tmp_path / "mine.pt")
    assert load_backbone("ViT-B-16-SigLIP", tmp_path / "mine.pt").mean == (0.5, 0.5, 0.5)
    assert load_backbone("ViT-L-14", tmp_path / "mine.pt").mean[0] == 0.48145466  # some differ


def test_names_that_do_not_exist(config, tmp_path):
    with pytest.raises(ValueError, match=r"no such model: 'ViT-B16'.*ViT-B-16"):
        load_backbone("ViT-B16")
    with pytest.raises(ValueError, match="no such config file"):
        load_backbone(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"'opanai' is neither a tag.*openai, laion400m_e31"):
        load_backbone("ViT-B-16", "opanai")
    with pytest.raises(CheckpointError, match=r"no such weights file: .*none\.pt"):
        load_backbone(config, str(tmp_path / "none.pt"))
    with pytest.raises(ValueError, match="expected one of raw, surgery"):
        load_backbone(config, attention="surgrey")
    with pytest.raises(ValueError, match="'clip' or 'released'"):
        load_backbone(config, class_token="own")
    with pytest.raises(ValueError, match=r"image size \(100, 100\)"):
        load_backbone(config, image_size=100)


def test_download_that_fails_says_so_once(monkeypatch, caplog):
    def fail(*_):
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    with pytest.raises(
        RuntimeError, match=r"downloading 'openai' weights of RN50 failed.*path"
    ) as e:
        load_backbone("RN50", "openai")
    assert e.value.__suppress_context__  # one traceback, not the hub client's before it
    assert not caplog.records


def test_weights_are_downloaded_by_one_process_and_found_by_the_others(monkeypatch, tmp_path):
    monkeypatch.setenv("CLIP_SURGERY_CACHE", str(tmp_path / "cache"))
    weights, downloads = tmp_path / "weights", []

    def fetch():  # as hub clients do: what is there is not fetched again
        if not weights.exists():
            downloads.append(1)
            time.sleep(0.05)
            weights.write_text("w")
        return weights.read_text()

    with ThreadPoolExecutor(4) as ranks:
        found = list(ranks.map(lambda _: download("weights", fetch, "-"), range(4)))
    assert found == ["w"] * 4
    assert len(downloads) == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLIP_SURGERY_CACHE", str(tmp_path / "file" / "cache"))
    assert download("weights", fetch, "-") == "w"  # where nothing can be locked


@pytest.mark.parametrize("loads", [load_backbone, load_tokenizer])
def test_a_text_tower_of_the_hub_that_cannot_be_reached(loads, monkeypatch):
    transformers = pytest.importorskip("transformers")

    def fail(*_, **__):
        raise OSError("no route to host\nsee the manual")

    for kind in (transformers.AutoConfig, transformers.AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", fail)
    with pytest.raises(UserError, match=r"roberta.* failed \(OSError: no route to host see.*cache"):
        loads("roberta-ViT-B-32", *([None] if loads is load_backbone else []))


def test_config_that_is_none(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"embed_dim": 64}')
    with pytest.raises(ValueError, match="missing vision_cfg, text_cfg"):
        load_backbone(str(path))
    path.write_text("{")
    with pytest.raises(ValueError, match="not a JSON config"):
        load_backbone(str(path))


def test_registry_is_left_alone(config):
    before = open_clip.list_models(), open_clip.get_model_config("ViT-B-16")
    load_backbone(config)
    assert before == (open_clip.list_models(), open_clip.get_model_config("ViT-B-16"))
