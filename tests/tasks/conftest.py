"""A tiny random CLIP, a handful of drawn scenes, and the command line called in this process."""

import functools
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from surgery import load_backbone
from surgery.backbone import Backbone
from tasks.__main__ import main

FOREVER = 900.0
"""Seconds after which a process is taken for one that never ends, on however busy a machine."""

TINY = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 48,
        "layers": 7,
        "width": 64,
        "head_width": 32,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Text features are cached in a folder of the test run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_SURGERY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Config of a CLIP with the stock tokenizer; random weights, the same every time."""
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="session")
def backbone(tiny) -> Backbone:
    """That CLIP; do not change it."""
    return load_backbone(str(tiny))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """20 drawn scenes in shards of 6, 6, 6 and 2."""
    folder = tmp_path_factory.mktemp("shards") / "shapes"
    command = ["shards", "shapes", "--count", "20", "--shard-size", "6", "--seed", "5"]
    assert main([*command, "--output", str(folder), "--workers", "1", "--size", "64"]) == 0
    return folder


@pytest.fixture(scope="session")
def command(tiny, scenes) -> Callable[..., list[str]]:
    """Words of a ``predict`` over the scenes, or over other ``--data=``; later words win."""

    def words(output: Path, *more: object, task: str = "Explainability") -> list[str]:
        others = any(str(word).startswith("--data=") for word in more)
        return [
            "predict",
            *("--model", task),
            *(() if others else ("--data", "Shapes", f"--data.shards={scenes}")),
            *(f"--model.backbone.model={tiny}", "--model.backbone.pretrained=null"),
            *("--trainer.accelerator=cpu", "--data.num_workers=0", "--data.batch_size=4"),
            *(f"--writer.output={output}", "--trainer.enable_progress_bar=false"),
            *map(str, more),
        ]

    return words


@pytest.fixture(scope="session")
def predict(command) -> Callable[..., Path]:
    """Run ``predict`` in this process; returns the run's folder."""

    def run(output: Path, *more: object, task: str = "Explainability") -> Path:
        assert main(command(output, *more, task=task)) == 0
        return output

    return run


@pytest.fixture(scope="session")
def finished(predict, tmp_path_factory) -> Path:
    """An undisturbed run over the scenes; do not change it, nor write to its folder."""
    return predict(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium; tests that need it are skipped where it, or playwright, is missing."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as player:
        opened = player.chromium.launch(executable_path=chromium, args=options)
        yield opened
        opened.close()


def members(path: Path) -> dict[str, bytes]:
    """All files of a tar."""
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """One more file in a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def with_broken_sample(scenes: Path, folder: Path, *more: str) -> Path:
    """The scenes with the second picture of the first shard, and more of others, cut in half."""
    shutil.copytree(scenes, folder)
    broken = {"000000": "00000001", **{shard: f"{6 * int(shard):08d}" for shard in more}}
    for shard, key in broken.items():
        found = members(scenes / f"{shard}.tar")
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for name, data in found.items():
                add(tar, name, data[: len(data) // 2] if name == f"{key}.png" else data)
    return folder


def same_results(one: Path, other: Path) -> bool:
    """Whether two runs have byte-identical shards and metrics."""
    names = sorted(p.name for p in one.glob("*.tar"))
    return (
        bool(names)
        and names == sorted(p.name for p in other.glob("*.tar"))
        and all((one / n).read_bytes() == (other / n).read_bytes() for n in names)
        and (one / "metrics.json").read_bytes() == (other / "metrics.json").read_bytes()
    )


def fail_once(monkeypatch, owner, name, error, *, after: int) -> None:
    """Let the call number ``after`` of ``owner.name`` raise ``error``, and no other."""
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def faulty(*args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, faulty)
