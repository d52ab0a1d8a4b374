"""The training of the demo's CLIP, a step of it: what it writes is a stock model that the tasks score."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from datamodules._drawing import NOUNS, draw_scene
from surgery import load_backbone
from tools.train_demo_clip import card, model, training
from tools.train_demo_clip.scenes import Words

pytestmark = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="training needs a torch with Muon"
)
RECIPE = training.Recipe(
    steps=1, batch=4, ring=4, fresh=2, test_every=1, test_scenes=4, held_out=4, tail=0.0
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    training.run(RECIPE, folder, processes=1, threads=torch.get_num_threads(), resume=None)
    return folder


def test_the_stock_model_is_the_trained_one(trained):
    words, text = Words(), "a photo of a red star"
    own = model.DemoCLIP(torch.zeros(model.WIDTH, 3, model.PATCH, model.PATCH), 1 + len(words.ids))
    model.load(own, words.ids, trained)
    backbone = load_backbone(str(trained / "config.json"), str(trained / "model.safetensors"))
    image = draw_scene(1, 0, model.IMAGE).image
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    everywhere = torch.arange(model.GRID**2)[None]
    with torch.no_grad():
        seen, said = own(model.patchify(image)[None], everywhere, *words.batch([words.rows(text)]))
        tokens = backbone.with_attention("raw").encode_image(backbone.preprocess(pixels))
        known = backbone.encode_text(backbone.tokenizer([text]))
    torch.testing.assert_close(F.normalize(tokens.class_token, dim=-1), seen, atol=1e-4, rtol=0)
    torch.testing.assert_close(F.normalize(known, dim=-1), said, atol=1e-4, rtol=0)


def test_only_rows_of_known_words_are_written(trained):
    weights = load_file(trained / "model.safetensors")
    assert "token_embedding.weight" not in weights
    assert len(weights["token_embedding.rows"]) == len(weights["token_embedding.ids"]) < 100


def test_a_run_goes_on_where_it_stopped(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "STORED_EVERY", 1)
    more = replace(RECIPE, steps=2, start=str(trained), decay_from=2)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    training.run(more, whole, 1, torch.get_num_threads(), None)
    training.run(more, resumed, 1, torch.get_num_threads(), whole)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, resumed, trained)]
    assert weights[0] == weights[1] != weights[2]


def test_the_card_tells_the_scores_of_the_tasks(trained, tmp_path, monkeypatch):
    measured = []

    def score(folder, **settings):
        measured.append(settings)
        return found

    found = card.score(trained, scenes=4)
    monkeypatch.setattr(card, "score", score)
    card.publish([trained], tmp_path, scenes=4)
    text = (tmp_path / "README.md").read_text()
    percent = [f"{100 * found.mean(method, 'mIoU'):.1f}" for method in card.METHODS]
    assert f"| {' | '.join(percent)} |" in text
    assert all(f"| {noun} |" in text for noun in NOUNS)
    assert {"scenes": 4, "background": "clouds"} in measured
    assert load_backbone(str(tmp_path / "config.json"), str(tmp_path / "model.safetensors"))
