"""How long until something happens? Commands and the way to the first batch, each in fresh processes.

    python benchmarks/startup.py --repeats 5 --output startup.json

The demo's shards are drawn, and its class texts cached, by a first run that isn't counted; medians of
the others are shown. A run's phases come from a wrapper that notes the time when functions of ours are
entered and left; nothing of the program is changed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _timing import format_table, write_json

COMMANDS = (
    ("--help",),
    ("predict", "--help"),
    ("shards", "--help"),
    ("shards", "voc", "--help"),
    ("list", "configs"),
    ("list", "tasks"),
)
PROBE = """
import sys, time
def note(what):
    with open(sys.argv[1], "a") as file:
        file.write(f"{what} {time.time()}\\n")
note("python")
import torch; note("torch")
import lightning.pytorch.cli; note("lightning")
from tasks.commands import predict; note("ours")
from lightning.pytorch import Callback
import tasks._task
class Probe(Callback):
    def setup(self, trainer, pl_module, stage): note("parsed")
    def on_predict_start(self, trainer, pl_module): note("set_up")
    def on_predict_batch_start(self, *_): note("batch")
    def on_predict_batch_end(self, *_): note("step")
inner = tasks._task.load_backbone
def load_backbone(*args, **kwargs):
    import open_clip; note("open_clip")
    found = inner(*args, **kwargs)
    note("backbone")
    return found
tasks._task.load_backbone = load_backbone
encode = tasks._task.Task.configure_texts
def configure_texts(task):
    encode(task)
    note("texts")
tasks._task.Task.configure_texts = configure_texts
class Probed(predict.Predict):
    def instantiate_trainer(self, **kwargs):
        self.trainer_defaults["callbacks"] = [Probe()]
        return super().instantiate_trainer(**kwargs)
predict.Predict = Probed
code = predict.main(sys.argv[2:])
note("end")
sys.exit(code)
"""
PHASES = {
    "python": "Python",
    "torch": "import torch",
    "lightning": "import Lightning (and torchmetrics)",
    "ours": "import ours",
    "parsed": "parse, make the objects",
    "open_clip": "import open_clip",
    "backbone": "backbone",
    "texts": "class texts, cached",
    "set_up": "trainer, output folder",
    "batch": "first batch from the loader",
    "step": "first step",
}
"""What ends a phase -> its name; in order."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="the DataLoader's")
    parser.add_argument("--output", type=Path, help="also write all seconds as json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        follow(folder, "first", args.workers)
        taken: dict[str, list[float]] = {}
        for number in range(args.repeats):
            for words in COMMANDS:
                taken.setdefault(f"lightning {' '.join(words)}", []).append(time_command(words))
            for phase, seconds in follow(folder, f"run{number}", args.workers).items():
                taken.setdefault(phase, []).append(seconds)
    rows = [
        {"what": what, "median s": statistics.median(s), "least": min(s), "most": max(s)}
        for what, s in taken.items()
    ]
    print(format_table(rows))
    if args.output:
        write_json(args.output, taken, repeats=args.repeats, workers=args.workers)
    return 0


def time_command(words: tuple[str, ...]) -> float:
    """Seconds of one command, from start to end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tasks", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def follow(folder: Path, name: str, workers: int) -> dict[str, float]:
    """Run the demo in a process of its own; seconds of each phase, and up to the first batch."""
    notes = folder / f"{name}.txt"
    words = ["--config", "demo.yaml", f"--data.shards={folder / 'shards'}"]
    words += [f"--writer.output={folder / name}", f"--data.num_workers={workers}"]
    words += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    began = time.time()
    run = subprocess.run(
        [sys.executable, "-c", PROBE, str(notes), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "CLIP_SURGERY_CACHE": str(folder / "cache")},
    )
    if run.returncode:
        sys.exit(f"{run.stderr}\nthe run of the demo ended with {run.returncode}")
    times: dict[str, float] = {}
    for line in notes.read_text().splitlines():
        what, at = line.split()
        times.setdefault(what, float(at))
    found: dict[str, float] = {}
    before = began
    for what, phase in PHASES.items():
        found[f"  {phase}"] = times[what] - before
        before = times[what]
    return {
        "command to first batch": times["batch"] - began,
        **found,
        "whole run": times["end"] - began,
    }


if __name__ == "__main__":
    sys.exit(main())
