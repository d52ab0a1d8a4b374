"""The paper's tables beside our runs, through the command line."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from tasks.__main__ import main
from tasks.reproduce import PLANS
from tasks.reproduce.card import read_card
from tasks.reproduce.numbers import numbers
from tasks.reproduce.plan import jobs
from tasks.reproduce.report import Reproduction
from tasks.reproduce.runs import processes
from tasks.run import Run

METHOD = {
    "CLIP": "clip",
    "Architecture": "architecture",
    "Architecture + feature surgery": "surgery",
}
QUIET = (
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--data.num_workers=0",
    "--data.batch_size=8",
)


def reproduce(name, output, *more):
    return main(["reproduce", name, f"--output={output}", *map(str, more)])


def rows(output, name):
    return list(csv.DictReader((output / f"{name}.csv").open()))


def test_a_table_on_the_demo_world_says_whether_the_papers_ordering_holds(tmp_path, capsys):
    assert reproduce("table3", tmp_path, "--demo", "--scenes=2", *QUIET) == 0
    said = capsys.readouterr().out
    found = rows(tmp_path, "table3")
    assert [(row["row"], row["metric"]) for row in found if not row["setting"]] == [
        (row, metric)
        for row in ("CLIP", "Architecture", "Architecture + feature surgery")
        for metric in ("mSC", "mIoU", "mAP")
    ]
    settings = {row["setting"] for row in found if row["metric"] == "mSC"}
    assert settings == {"", "order=paper", "form=paper", "form=paper order=paper"}
    ours = {(r["row"], r["metric"]): float(r["ours"]) for r in found if not r["setting"]}
    for row in found:
        summary = json.loads((tmp_path / "runs" / row["run"] / "metrics.json").read_text())
        name, form = row["metric"], "_paper" if "form=paper" in row["setting"] else ""
        if name == "mAP":
            of = summary["metrics"]
            name += form if "surgery" in row["row"] else "_softmax"
        else:
            of = summary["methods"][METHOD[row["row"]] + form]
            name += "_order_paper" if "order=paper" in row["setting"] else ""
        assert float(row["ours"]) == of[name]
    assert len(list((tmp_path / "runs").iterdir())) == 2  # one for all that explain
    order = ["CLIP", "Architecture", "Architecture + feature surgery"]
    for metric in ("mSC", "mIoU", "mAP"):
        for below, above in ((0, 1), (0, 2), (1, 2)):
            if metric == "mAP" and above == 1:
                continue  # printed the same: nothing to claim
            one, other = ours[order[above], metric], ours[order[below], metric]
            broken = f"{metric}: {order[above]} {100 * one:.2f} is not above {order[below]}"
            assert (broken in said) == (one <= other)
    assert (tmp_path / "table3.md").read_text().count("| CLIP |  |") == 1
    card = tmp_path / "table3.card.json"
    table = said[said.index("\ntable3: ") : said.index("\nwritten to")].splitlines()
    assert main(["reproduce", str(card)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [line for line in table if not line.startswith("Every run with")]
    assert str(tmp_path) not in card.read_text()
    assert "table3.csv" in {path.name for path in tmp_path.iterdir()}
    whole = json.loads(card.read_text())
    run = next(iter(whole["runs"].values()))
    assert run["data"]["images"] == 2
    assert sum(job["images"] for job in run["jobs"]) == 2
    assert main(["--version"]) == 0
    assert f"(source {run['versions']['source']})" in capsys.readouterr().out
    for change, told in (
        (lambda c: c["cells"][0].update(ours=37.9), "no fraction"),
        (lambda c: c["cells"][0].update(row="Theirs"), "no cell Theirs"),
        (lambda c: c["cells"][0].update(run="another"), "not there"),
        (lambda c: next(iter(c["runs"].values())).update(weights="1"), "digest"),
        (lambda c: c.pop("runs"), "no card"),
        (lambda c: c.update(format=9), "format 9"),
    ):
        broken = json.loads(json.dumps(whole))
        change(broken)
        card.write_text(json.dumps(broken))
        assert main(["reproduce", str(card)]) == 1
        assert told in capsys.readouterr().err


def test_cards_that_were_sent_can_be_read():
    for path in (Path(__file__).parents[2] / "results").glob("*.json"):
        assert read_card(path, PLANS)


def test_what_several_tables_need_is_run_once(tmp_path, capsys):
    assert reproduce("all", tmp_path / "paper", "--demo", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({*lines}) == len(lines)
    every = "clip-surgery-grad_cam-plrp-bi_modal-gscorecam-rclip-architecture-surgery_paper"
    assert f"demo_explainability-{every}" in lines
    assert sum("analysis" in line for line in lines) == 1


def test_variations_are_of_all_ten_values():
    plan = PLANS["sensitivity"]
    cells = plan.cells()
    ours = {c: float(c.setting) / 100 for c in cells if c.row == "tau" and c.setting != "4"}
    assert not plan.derive(cells, ours)
    ours |= {c: 0.5 for c in cells if (c.row, c.setting) == ("tau", "4")}
    ((cell, value),) = plan.derive(cells, ours).items()
    assert (cell.row, cell.paper) == ("Variation over tau in 1..10", 0.0012)
    assert value == pytest.approx(0.49)


def test_processes_are_those_of_the_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)
    assert processes() == {"trainer.devices": 1, "trainer.num_nodes": 1}
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_NNODES", "2")
    assert processes() == {"trainer.devices": 4, "trainer.num_nodes": 2}
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert processes() == {"trainer.devices": 2, "trainer.num_nodes": 3}


def test_ours_beside_the_printed_numbers(scenes, tiny, tmp_path, capsys):
    """What has shards is run, in one pass for both methods; the rest is named; a failure is, too."""
    root = tmp_path / "data"
    (root / "voc").mkdir(parents=True)
    shutil.copy(scenes / "000003.tar", root / "voc")  # drawn scenes in VOC's place
    output = tmp_path / "paper"
    words = ("table1", output, f"--data-root={root}", "--backbones", "vit_b16")
    tower = (f"--model.backbone.model={tiny}", "--model.backbone.pretrained=null", *QUIET)
    assert reproduce(*words, *tower) == 0
    said = capsys.readouterr().out
    assert f"Every run with --model.backbone.model={tiny} --model.backbone.pretrained=null" in said
    assert "lightning shards coco --source coco --split val --output" in said
    found = {(row["row"], row["data"], row["metric"]): row for row in rows(output, "table1")}
    assert len(list((output / "runs").iterdir())) == 1
    for method, name in (("CLIP", "clip"), ("Ours", "surgery")):
        row = found[method, "voc", "mSC"]
        summary = json.loads((output / "runs" / row["run"] / "metrics.json").read_text())
        assert float(row["ours"]) == summary["methods"][name]["mSC"]
        assert float(row["difference"]) == float(row["ours"]) - float(row["paper"])
        assert f"{100 * float(row['ours']):.2f} ({100 * float(row['paper']):.2f};" in said
    assert found["Ours", "voc", "mIoU"]["paper"] == "0.5578"
    missing = found["Ours", "coco", "mIoU"]
    assert missing["ours"] == ""
    assert missing["paper"]
    assert "no shards" in missing["why_not"]
    (shard,) = (output / "runs").glob("*/*.tar")
    written = shard.stat().st_mtime_ns
    (root / "coco").mkdir()
    (root / "coco" / "000000.tar").write_bytes(b"no tar at all" * 100)
    assert reproduce(*words, "--datasets", "voc", "coco", *tower) == 1
    again = {(row["row"], row["data"], row["metric"]): row for row in rows(output, "table1")}
    assert shard.stat().st_mtime_ns == written  # a finished run is not done again
    assert again["Ours", "voc", "mSC"] == found["Ours", "voc", "mSC"]
    assert "the run failed" in again["Ours", "coco", "mSC"]["why_not"]


def test_the_mean_over_backbones_needs_all_of_them():
    class Finished:
        def __init__(self, value):
            each = {"mIoU": value, "mSC": value}
            self.summary = {"metrics": each, "methods": {"clip": each, "surgery": each}}
            two = {"mIoU": value + 0.25, "mSC": value + 0.5}
            self.summary["methods"]["surgery"] = two

    found = Reproduction.of(PLANS["table1"], demo=False)
    of_voc = [job for job in jobs(found.cells) if job.shards == "voc" and len(job.methods) == 2]
    (mean,) = (c for c in found.cells if (c.backbone, c.data, c.metric) == ("", "voc", "mSC"))
    for i, job in enumerate(of_voc):
        assert mean not in found.ours
        found.fill(job.cells, Finished(i / 10), job.name)
    assert found.ours[mean] == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["table2", "table5", "table6", "figure4", "figure10"])
def test_runs_are_listed_and_nothing_is_done(name, tmp_path, capsys):
    output = tmp_path / "paper"
    assert reproduce(name, output, f"--data-root={tmp_path}", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(f"no shards in {tmp_path}" in line for line in lines)
    assert len({line.split()[0] for line in lines}) == len(lines)
    assert not output.exists()


def test_mistyped_words_are_told(tmp_path, capsys):
    for words, told in (
        (["--methods", "Grad-CAM"], "table1 has no 'Grad-CAM'"),
        (["--scenes", "3"], "--scenes is the demo's"),
        (["--demo", "hello"], "'hello' is neither"),
        (["--demo", "--trainer.devices=2"], "start several with torchrun"),
        (["--demo", "--writer.output=x"], "below --output"),
    ):
        with pytest.raises(SystemExit, match="2"):
            reproduce("table1", tmp_path, *words)
        assert told in capsys.readouterr().err


def test_the_field_each_under_its_own_protocol_and_under_one(tmp_path, capsys):
    methods = ["SCLIP", "NACLIP + PAMR", "RF-CLIP"]
    words = ["--demo", "--scenes=1", "--methods", *methods, *QUIET]
    assert reproduce("family", tmp_path, *words) == 0
    said = capsys.readouterr().out
    assert "Not run: RF-CLIP own protocol demo" in said
    found = {(row["row"], row["setting"]): row for row in rows(tmp_path, "family")}
    assert found["SCLIP", "own protocol"]["run"] == found["SCLIP", "protocol sclip"]["run"]
    assert len(list((tmp_path / "runs").iterdir())) == 3
    for key in (("SCLIP", "own protocol"), ("NACLIP + PAMR", "protocol sclip")):
        run = json.loads((tmp_path / "runs" / found[key]["run"] / "run.json").read_text())
        (job,) = Run.load(tmp_path / "runs" / found[key]["run"]).jobs
        assert float(found[key]["seconds_an_image"]) == job["seconds"] > 0
        assert 0 <= float(found[key]["ours"]) <= 1
        assert (
            run["identity"]["task"]["window"] == 96
        )  # the demo network's own, as 224 is ViT-B/16's
    assert run["protocol"]["dataset"] == "shapes, as voc20"
    assert run["protocol"]["departs"] == {"model.refine": {"protocol": None, "run": "pamr"}}
    assert len(json.loads((tmp_path / "family.card.json").read_text())["cells"]) == 4


def test_what_the_field_prints_of_itself_has_a_source_and_a_mean():
    plan = PLANS["family"]
    cells = plan.cells()
    printed = [cell for cell in cells if cell.paper is not None]
    assert len(printed) == len(numbers("family.csv"))
    assert all(cell.source for cell in printed)
    own = [c for c in cells if c.setting == "own protocol" and c.row == "SC-CLIP"]
    assert {(c.backbone, c.reading.options[1]) for c in own if c.reading} == {
        ("vit_b16", "--model.protocol=sc_clip"),
        ("vit_l14", "--model.protocol=sc_clip_l14"),
    }
    eight = [c for c in own if c.reading and c.backbone == "vit_b16"]
    assert len(eight) == 8
    (mean,) = (c for c in own if c.derived and c.backbone == "vit_b16")
    values = {cell: i / 10 for i, cell in enumerate(eight)}
    assert plan.derive(cells, values) == {mean: pytest.approx(0.35)}
    assert plan.derive(cells, dict(list(values.items())[1:])) == {}
