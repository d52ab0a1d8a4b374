"""Every data set: its official layout becomes shards, and what streams out is what was in it."""

import json

import numpy as np
import pytest
import torch

import datamodules
from common.errors import MissingFile
from datamodules import DATASETS, READ_AS_THEY_ARE
from datamodules._samples import DatasetInfo
from datamodules._words import packaged, read_wording
from tasks.__main__ import main
from tests.datamodules.fakes import (
    fake_ade20k,
    fake_cityscapes,
    fake_coco,
    fake_coco_object,
    fake_coco_stuff,
    fake_coco_stuff_converted,
    fake_imagenet_s,
    fake_imagenet_s300,
    fake_nus_wide,
    fake_nus_wide_csv,
    fake_pascal_context,
    fake_pascal_context_mat,
    fake_voc,
    label_png,
)

FAKES = [
    ("voc", fake_voc),
    ("pascal_context", fake_pascal_context),
    ("pascal_context", fake_pascal_context_mat),
    ("coco", fake_coco),
    ("coco_stuff", fake_coco_stuff),
    ("coco_stuff", fake_coco_stuff_converted),
    ("coco_object", fake_coco_object),
    ("cityscapes", fake_cityscapes),
    ("ade20k", fake_ade20k),
    ("imagenet_s", fake_imagenet_s),
    ("imagenet_s", fake_imagenet_s300),
    ("nus_wide", fake_nus_wide),
    ("nus_wide", fake_nus_wide_csv),
]


def convert(name, source, output, *more):
    argv = ["shards", name, "--source", str(source), "--output", str(output), "--workers", "1"]
    return main([*argv, *more])


def stream(name, shards, **fields):
    data = getattr(datamodules, DATASETS[name])(
        shards=str(shards), batch_size=2, num_workers=0, image_size=16, **fields
    )
    return data, list(data.loader())


@pytest.mark.parametrize(("name", "fake"), FAKES, ids=[fake.__name__ for _, fake in FAKES])
def test_every_label_pixel_comes_through(name, fake, tmp_path):
    truth = fake(tmp_path / "source")
    assert convert(name, tmp_path / "source", tmp_path / "shards", "--shard-size", "2") == 0
    data, batches = stream(name, tmp_path / "shards")
    assert not [error for batch in batches for error in batch.errors]
    assert [key for batch in batches for key in batch.keys] == sorted(truth)
    for batch in batches:
        assert isinstance(batch.images, torch.Tensor)
        for key, _, size, label, positives, *_ in batch.samples:
            wanted = truth[key]
            if isinstance(wanted, tuple):
                assert (label, positives) == (None, wanted)
            elif isinstance(wanted, dict):
                assert positives == tuple(wanted)
                assert label.shape == (len(wanted), *size)
                for mask, expected in zip(label, wanted.values(), strict=True):
                    np.testing.assert_array_equal(mask, expected)
            else:
                np.testing.assert_array_equal(label, wanted)
                first = data.info.label_value(0)
                values = set(np.unique(wanted).tolist()) - {data.info.void}
                assert positives == tuple(sorted(v - first for v in values if v >= first))
    assert main(["shards", "verify", str(tmp_path / "shards"), "--workers", "1"]) == 0


def test_no_dataset_is_without_a_fake():
    assert {name for name, _ in FAKES} == DATASETS.keys() - READ_AS_THEY_ARE - {"shapes"}


@pytest.mark.parametrize("name", sorted({name for name, _ in FAKES}))
def test_a_wrong_folder_is_told_what_was_expected(name, tmp_path, capsys):
    (tmp_path / "something_else").mkdir()
    assert convert(name, tmp_path, tmp_path / "shards") == 1
    said = capsys.readouterr().err
    assert "Expected --source to hold" in said
    assert "something_else" in said
    assert "--download" in said or "To get the official files" in said
    with pytest.raises(SystemExit):
        main(["shards", name, "--help"])
    cls = getattr(datamodules, DATASETS[name])
    assert cls.layout.splitlines()[0] in capsys.readouterr().out


def test_missing_photographs_are_counted_and_listed(tmp_path, capsys):
    fake_nus_wide(tmp_path / "source")
    convert("nus_wide", tmp_path / "source", tmp_path / "shards")
    described = json.loads((tmp_path / "shards" / "dataset.json").read_text())
    assert described["samples"] == 3
    assert [key for key, _ in described["bad"]] == ["cat-0003_3"]
    assert "1 left out" in capsys.readouterr().out


def test_crowds_can_count_as_foreground(tmp_path):
    fake_coco(tmp_path / "source")
    assert convert("coco", tmp_path / "source", tmp_path / "other", "--split", "val2017") == 0
    assert json.loads((tmp_path / "other" / "dataset.json").read_text())["split"] == "val"
    convert("coco", tmp_path / "source", tmp_path / "shards", "--crowd", "foreground")
    _, batches = stream("coco", tmp_path / "shards")
    crowd = batches[0].samples[1]
    assert crowd.positives == (0, 2)
    assert set(np.unique(crowd.label).tolist()) == {0, 1}


def test_a_value_that_the_maps_may_not_have_is_named(tmp_path, capsys):
    truth = fake_coco_stuff(tmp_path)
    key = next(iter(truth))
    label_png(tmp_path / "annotations" / "val2017" / f"{key}.png", np.full((30, 44), 11, np.uint8))
    convert("coco_stuff", tmp_path, tmp_path / "shards")
    assert f"{key}.png has unknown values [11]" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(DATASETS.keys() - READ_AS_THEY_ARE))
def test_names_colours_and_words_fit(name, tmp_path):
    cls = getattr(datamodules, DATASETS[name])
    info = cls.info
    assert len(set(info.classes)) == len(set(info.prompts)) == len(info.classes)
    assert len(info.palette) == len(info.classes)
    for wording in (*cls.wordings, *packaged(info.name)):
        data = cls(
            shards=str(tmp_path), synonyms=wording, background=info.zero_is_background or None
        )
        assert len(data.info.prompts) == len(info.classes)
        words = len(info.classes) + bool(data.info.background_words)
        assert len(data.info.synonyms) in (0, words)
    assert cls(shards=str(tmp_path), synonyms="raw").info.prompts == info.classes


def test_background_leads_the_synonyms():
    data = datamodules.VOC("shards", synonyms="sclip", background=True)
    assert data.info.synonyms[0] == data.info.background_words
    assert data.info.synonyms[0][:2] == ("sky", "wall")
    assert data.info.synonyms[4] == ("ship",)
    assert data.info.prompts[3] == "ship"
    assert datamodules.VOC("shards").info.synonyms == ()
    assert datamodules.VOC("shards", background=True).info.synonyms[:2] == (
        ("background",),
        ("aeroplane",),
    )
    with pytest.raises(ValueError, match="no background"):
        datamodules.Cityscapes("shards", background=True)
    with pytest.raises(ValueError, match="none, raw, official, cliper, cliptrase, corrclip, sclip"):
        datamodules.ADE20K("shards", synonyms="naclip")


def test_words_in_files(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text('# mine\ncat, kitty\n"dog, but small", puppy\n')
    info = DatasetInfo("pets", ("cat", "dog"))
    assert read_wording(words, info) == (
        (("cat", "kitty"), ("dog, but small", "puppy")),
        ("background",),
    )
    words.write_text("sky, grass\ncat\ndog\n")
    assert read_wording(words, info) == ((("cat",), ("dog",)), ("sky", "grass"))
    voc = datamodules.VOC("shards", synonyms="cliper", background=True).info
    assert voc.prompts[14] == "person with clothes, people, human"
    assert voc.background_words[:2] == ("ground", "land")
    words.write_text("cat\n")
    with pytest.raises(ValueError, match=r"words.txt has words for 1 classes, but voc has 20"):
        datamodules.VOC("shards", synonyms=str(words))
    with pytest.raises(MissingFile, match=r"--data.synonyms 'nowhere.txt'"):
        datamodules.VOC("shards", synonyms="nowhere.txt")


def test_words_of_sclips_evaluation_that_are_no_dictionarys():
    ade = datamodules.ADE20K("shards", synonyms="sclip").info
    assert {"chestofdrawers", "televisionreceiver", "crtscreen"} <= set(ade.prompts)
    stuff = datamodules.COCOStuff("shards", synonyms="sclip").info
    assert sum(a != b for a, b in zip(stuff.prompts, stuff.classes, strict=True)) == 15


@pytest.mark.parametrize(
    ("name", "official", "readable"),
    [
        ("voc", "aeroplane", "airplane"),
        ("pascal_context", "aeroplane", "airplane"),
        ("nus_wide", "nighttime", "night time"),
    ],
)
def test_official_words_by_default_and_friendlier_ones_by_name(name, official, readable):
    cls = getattr(datamodules, DATASETS[name])
    index = cls.info.classes.index(official)
    assert cls("shards").info.prompts[index] == official
    assert cls("shards", synonyms="readable").info.prompts[index] == readable
