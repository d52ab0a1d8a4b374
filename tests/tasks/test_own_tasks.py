"""Tasks of one's own: found beside their config, never in the current folder."""

import json
import subprocess
import sys

import pytest

from tasks.__main__ import main

MINE = """
from base_of_mine import Base

class MyTask(Base):
    def __init__(self, loudness: int = 3, **kwargs):
        super().__init__(**kwargs)
        self.loudness = loudness
"""


def test_a_task_of_ones_own_lies_beside_the_config(tmp_path, monkeypatch, capsys, command):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "task_of_mine.py").write_text(MINE)
    (folder / "base_of_mine.py").write_text("from tasks import Explainability as Base\n")
    path = folder / "own.yaml"
    path.write_text("model:\n  class_path: task_of_mine.MyTask\n  init_args: {loudness: 11}\n")
    monkeypatch.setattr("sys.path", [*sys.path])
    words = [word for word in command(tmp_path / "run", "--config", path) if word != "--model"]
    words.remove("Explainability")
    assert main([*words, "--model.threshold=0.4"]) == 0
    task = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]["task"]
    assert task["class"] == "MyTask"
    assert (task["loudness"], task["threshold"]) == (11, 0.4)
    assert (task["void"], task["backbone"]["blocks"]) == ("ignore", 6)


MEASURED = """
from tasks.measures import Report
from tasks.measures.explainability import ExplainabilityMeasures
from tasks import Explainability

class MyMeasures(ExplainabilityMeasures):
    def report(self):
        return Report({"mine": super().report().metrics["mIoU"]})

class MyTask(Explainability):
    measured_by = MyMeasures
"""


@pytest.mark.parametrize("measures", ["own", "ours"])
def test_the_metrics_of_a_task_of_ones_own(measures, tmp_path, monkeypatch, capsys, command):
    text = MEASURED if measures == "own" else MEASURED.replace("measured_by = My", "named_by = My")
    path, run = tmp_path / "own.yaml", tmp_path / "run"
    (tmp_path / f"measured_{measures}.py").write_text(text)
    path.write_text(f"model: {{class_path: measured_{measures}.MyTask}}")
    monkeypatch.setattr("sys.path", [*sys.path])
    assert (
        main([w for w in command(run, "--config", path, task="") if w not in ("--model", "")]) == 0
    )
    before = (run / "metrics.json").read_bytes()
    assert ("mine" in json.loads(before)["metrics"]) == (measures == "own")
    (run / "metrics.json").unlink()
    assert main(["metrics", str(run)]) == (1 if measures == "own" else 0)
    if measures == "own":  # nothing that a run's folder names is imported
        told = capsys.readouterr().err
        assert "measured_own.MyMeasures" in told
        assert f"lightning metrics {run} --config CONFIG" in told
        assert main(["metrics", str(run), "--config", "demo"]) == 1
        assert "names Explainability, and" in capsys.readouterr().err
        assert main(["metrics", str(run), "--config", str(path)]) == 0
    assert (run / "metrics.json").read_bytes() == before


def test_the_current_folder_is_not_where_classes_are_looked_for(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('imported from the current folder')")
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the current folder')")
    (tmp_path / "trap.py").write_text("raise SystemExit('imported from the current folder')")
    words = ["predict", "--config", "vit_b16_voc", "--model", "trap.Task"]
    done = subprocess.run(
        [sys.executable, "-m", "tasks", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert "no module 'trap'" in done.stderr
    assert "imported from" not in done.stderr
