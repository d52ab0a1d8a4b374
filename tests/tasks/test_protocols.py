"""Protocols: what each fixes, which settings win, and what a run says of them."""

import json

import pytest
import yaml

import datamodules
from tasks import Segmentation
from tasks.__main__ import main
from tasks._configs import FOLDER, names_of
from tasks._protocols import SETS, find_protocol
from tests.datamodules import fakes

# Read from the repositories' configs a second time: short side / window - stride / scale / probability /
# area; "-" for whole images, nothing where there is no threshold.
TABLE = """
protocol     voc21                        voc20            context60             context59        coco_object         coco_stuff       cityscapes       ade20k
sclip        336/224-112/65/.1/.1         336/224-112/40   336/224-112/50/.1     336/224-112/40   336/224-112/50/.1   448/224-112/40   560/224-112/40   336/224-112/40
clearclip    448/448-224/50/.5            448/448-224/50   448/448-224/50/.15    448/448-224/50   448/448-224/50/.4   448/448-224/50   448/224-224/50   448/448-224/50
naclip       336/-/40/.1                  336/-/40         336/224-112/40/.1     336/224-112/40   336/224-112/40/.1   336/224-112/40   560/224-112/40   336/224-112/40
resclip      336/-/40/.1                  336/-/40         336/224-112/40/.1     336/224-112/40   336/224-112/40/.1   336/224-112/40   560/224-112/40   336/224-112/40
pearl        336/-/40/.1                  336/-/40         336/224-112/40/.1     336/224-112/40   336/224-112/40/.1   336/224-112/40   560/224-112/40   336/224-112/40
rf_clip      336/-/40/.1                  336/224-112/40   336/224-112/40/.1     336/224-112/40   336/224-112/40/.1   336/-/40         560/224-112/40   336/224-112/40
sc_clip      336/224-112/50/.15/.1        336/224-112/40   336/224-112/40/.15    336/224-112/40   336/224-112/55/.35  336/224-112/40   560/224-112/40   336/224-112/40
sc_clip_l14  336/224-112/40/.2/.1         336/224-112/40   336/224-112/40/.15    336/224-112/40   336/224-112/40/.25  336/224-112/40   560/224-112/40   336/224-112/40
sfp          336/224-112/50/.15/.1        336/224-112/40   336/224-112/40/.15    336/224-112/40   336/224-112/55/.35  336/224-112/40   560/224-112/40   384/224-112/40
"""  # noqa: E501  (a table)
HEAD, *ROWS = (line.split() for line in TABLE.strip().splitlines())
OFFERED = [
    name
    for name in names_of("protocols")
    if "refused" not in yaml.safe_load((FOLDER / "protocols" / f"{name}.yaml").read_text())
]


def of_set(dataset):
    """The DataModule, and whether its background is a class."""
    (cls, background) = next(key for key, name in SETS.items() if name == dataset)
    return getattr(datamodules, cls), background


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_settings_are_those_of_the_repositories(row):
    for dataset, cell in zip(HEAD[1:], row[1:], strict=True):
        fields = find_protocol(row[0], *of_set(dataset)).fields
        size, window, scale, *thresholds = cell.split("/")
        sides = [None, None] if window == "-" else [int(n) for n in window.split("-")]
        assert fields["data.image_size"] == int(size)
        assert [fields["model.window"], fields["model.stride"]] == sides
        assert fields["model.logit_scale"] == int(scale)
        found = [fields["model.prob_thd"], fields["model.area_thd"]]
        assert [x for x in found if x is not None] == [float(x) for x in thresholds]


@pytest.mark.parametrize("name", OFFERED)
def test_every_protocol_fixes_all_and_fits_its_data_sets(name, tmp_path):
    for dataset in SETS.values():
        cls, background = of_set(dataset)
        protocol = find_protocol(name, cls, background)
        assert protocol.fields.keys() == find_protocol("paper", *of_set("voc20")).fields.keys()
        assert all(part for part in protocol.source.split())
        fields = protocol.fitted(None)
        data, task = cls(str(tmp_path), **fields["data"]), Segmentation(**fields["model"])
        task.check_data(data)
        assert protocol.departures(task, data) == {}
        assert task.has_background(data.info) == background


def printed(capsys, *words):
    """What would run: the fields of the task and of the data set."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["predict", *map(str, words), "--print_config"])
    assert end.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    return shown["model"]["init_args"], shown["data"]["init_args"]


def test_what_stands_beside_the_name_or_comes_later_wins(capsys, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "backbone: vit_l14\nexperiment: cityscapes\nmodel: {protocol: sclip, logit_scale: 30}\n"
    )
    model, data = printed(capsys, "--config", mine, "--model.window=196", "--model.stride=98")
    assert (model["logit_scale"], model["window"], model["tile"]) == (30, 196, None)
    assert (data["image_size"], data["resize"], data["synonyms"]) == (560, "opencv", "sclip")
    later = tmp_path / "later.yaml"
    later.write_text("data: {image_size: 448}\n")
    model, data = printed(
        capsys, "--config", mine, "--config", later, "--model.protocol", "clearclip"
    )
    assert (model["logit_scale"], data["image_size"]) == (50, 448)
    assert data["background"] is None
    model, data = printed(capsys, "--config", mine, "--config", later)
    assert (model["logit_scale"], data["image_size"]) == (30, 448)


def test_the_papers_sizes_follow_the_tower_and_null_is_no_protocol(capsys):
    model, data = printed(capsys, "--config", "vit_l14_cityscapes", "--model.protocol=paper")
    assert (model["tile"], data["image_size"]) == (518, [1036, 2072])
    model, data = printed(capsys, "--config", "vit_l14_voc20", "--model.protocol=null")
    assert (model["protocol"], model["templates"], data["image_size"]) == (None, "surgery", 518)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.protocol=slcip"], "Did you mean sclip?"),
        (["--model.protocol=cliptrase"], "is not offered: it scores a centre crop"),
        (["--model.protocol=sclip", "--data", "ImageNetS"], "says nothing of ImageNetS"),
    ],
)
def test_what_is_no_protocol_of_the_data_is_refused(words, message, capsys):
    assert main(["predict", "--config", "vit_b16_voc21", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_says_what_it_follows_and_where_it_departs(tiny, tmp_path, capsys):
    fakes.fake_voc(tmp_path / "source")
    shards = ["shards", "voc", "--source", tmp_path / "source", "--output", tmp_path / "shards"]
    assert main([*map(str, shards), "--workers", "1"]) == 0
    words = ["predict", "--config", "vit_b16_voc21", "--model.protocol", "naclip"]
    words += [f"--data.shards={tmp_path / 'shards'}", f"--writer.output={tmp_path / 'run'}"]
    words += [f"--model.backbone.model={tiny}", "--model.backbone.pretrained=null"]
    words += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    words += ["--data.num_workers=0", "--data.image_size=50"]
    assert main(words) == 0
    assert "naclip on voc21, but data.image_size 50 in place of 336" in capsys.readouterr().out
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["protocol"]["departs"] == {"data.image_size": {"protocol": 336, "run": 50}}
    assert described["protocol"]["source"].startswith("sinahmr/NACLIP configs/cfg_voc21.py 0cac3a6")
    assert described["identity"]["task"]["refine"] == "pamr"
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    assert main(["predict", "--config", str(tmp_path / "run" / "config.yaml")]) == 0  # goes on
    assert "in place of" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before


def test_they_are_listed(capsys):
    assert main(["list", "protocols"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in names_of("protocols"))
    assert "not comparable" in listed
