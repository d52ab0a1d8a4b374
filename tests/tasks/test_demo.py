"""The science on the demo world: what the paper claims, asked of the tiny CLIP in this package.

The scenes are of worlds that it was not trained on; the margins are far wider than their noise.
"""

import json
import re
from pathlib import Path

import pytest

from tasks.__main__ import main


def shards(folder: Path, *more: str) -> Path:
    words = ["shards", "shapes", "--count", "128", "--shard-size", "64", "--seed", "31"]
    assert main([*words, "--workers", "1", "--output", str(folder), *more]) == 0
    return folder


def run(output: Path, scenes: Path, task: str, *more: str) -> dict:
    words = [
        *("predict", "--config", "demo.yaml", "--model", task, f"--data.shards={scenes}"),
        *("--trainer.accelerator=cpu", "--data.num_workers=0", "--data.batch_size=32"),
        *(f"--writer.output={output}", "--writer.overlays=false"),
        *("--trainer.enable_progress_bar=false", *more),
    ]
    assert main(words) == 0
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return shards(tmp_path_factory.mktemp("held out") / "shapes")


@pytest.fixture(scope="module")
def surgery(scenes, tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "surgery", scenes, "Explainability")


def test_it_recognises_what_is_there(scenes, tmp_path):
    assert run(tmp_path / "run", scenes, "Recognition")["metrics"]["mAP_cosine"] >= 0.85


def test_surgery_beats_plain_clip(surgery):
    assert surgery["metrics"]["mIoU"] >= 1.5 * surgery["methods"]["clip"]["mIoU"]
    assert surgery["metrics"]["mSC"] >= surgery["methods"]["clip"]["mSC"] + 0.05
    assert surgery["metrics"]["mIoU"] > 4 * surgery["details"]["mIoU_all_foreground"]


def test_architecture_surgery_alone_beats_plain_clip(surgery, scenes, tmp_path):
    alone = run(tmp_path / "run", scenes, "Explainability", "--model.feature_surgery=none")
    assert alone["metrics"]["mIoU"] > 1.3 * alone["methods"]["clip"]["mIoU"]
    assert surgery["metrics"]["mSC"] > alone["metrics"]["mSC"]


def test_an_unseen_background_like_a_photographs(tmp_path):
    clouds = shards(tmp_path / "clouds", "--background", "clouds")
    found = run(tmp_path / "run", clouds, "Explainability")
    assert found["metrics"]["mIoU"] > 4 * found["details"]["mIoU_all_foreground"]
    assert found["metrics"]["mIoU"] > 1.8 * found["methods"]["clip"]["mIoU"]


@pytest.mark.parametrize("task", ["Segmentation", "Interactive", "Multimodal", "Analysis"])
def test_every_task_runs_on_it(scenes, task, tmp_path):
    assert run(tmp_path / "run", scenes, task)["images"] == 128


def test_readme_terminal_and_files_of_the_demo_agree(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["predict", "--config", "demo.yaml", "--trainer.accelerator=cpu"]
    assert main([*words, "--trainer.enable_progress_bar=false", "--data.num_workers=0"]) == 0
    said = capsys.readouterr().out
    surgery, clip = re.search(r"surgery +clip\n +mIoU +([\d.]+) % +([\d.]+) %", said).groups()
    shown = [round(float(clip)), round(float(surgery))]
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    told = re.search(r"mIoU goes from (\d+) % to (\d+) % with surgery", readme).groups()
    assert shown == [int(n) for n in told]
    summary = json.loads(Path("runs/demo/metrics.json").read_text())
    assert summary["details"]["mIoU_at_fixed_threshold"] == summary["metrics"]["mIoU"]
    assert "best threshold" not in said
    picture = re.search(r"pictures: (\S+)", said)[1]
    assert re.search(r"\d\.surgery\.map\.\d", picture)
    assert Path(picture).exists()
