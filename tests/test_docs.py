"""README and docs are true: Python and commands in them run on the demo, fields and links exist."""

import inspect
import re
import shlex
import subprocess
import typing
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from PIL import Image

import datamodules
import surgery
import tasks
from tasks.__main__ import COMMANDS, main
from tasks.commands import app, shards
from tasks.run.meaning import MEANINGS, meaning_of

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("**/*.md")),
    *(ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"),
    *(ROOT / folder / "README.md" for folder in ("configs", "results", "benchmarks")),
    ROOT / "surgery/demo_clip/README.md",
]
NEEDS = {"weights", "data", "cluster", "gpu", "network", "time", "browser"}
"""What a block may say that it needs, in its first line: ``# needs: weights, data``."""

ELSEWHERE = {"python3", "pip", "pre-commit", "pytest", "ruff", "mypy", "mkdocs", "."}
"""Programs in blocks that `.ci/run` runs."""

SMALL = {
    "predict": ["--data.num_workers=0", "--trainer.enable_progress_bar=false"],
    "reproduce": ["--data.num_workers=0", "--trainer.enable_progress_bar=false"],
    "shards shapes": ["--workers=1"],
    "shards verify": ["--workers=1"],
}
"""Words of a command -> words that make it cheap."""


def blocks(page):
    """(language, what it says that it needs, its text) of each block of sh and Python of a page."""
    for language, text in re.findall(
        r"^```(sh|python)\n(.*?)^```", page.read_text(), re.DOTALL | re.M
    ):
        needs = re.match(r"# needs: (.+)\n", text)
        yield language, set(needs[1].split(", ")) if needs else set(), text


def commands(text):
    """The commands of a block of sh, as words."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r" && | ; ", line):
            if words := shlex.split(part, comments=True):
                yield words


DEMO = ["predict", "--config", "demo.yaml"]
SEGMENTED = [*DEMO, "--model", "Segmentation", "--writer.output"]
RUNS = {
    "runs/demo": DEMO,
    "runs/surgery": [*SEGMENTED, "runs/surgery"],
    "runs/plain": [*SEGMENTED, "runs/plain", "--model.backbone.attention", "raw"],
}
"""Runs that pages look at which another page made: its name -> how."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all pages' blocks run, one after another."""
    place = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_SURGERY_CACHE", str(place / "cache"))
        patch.chdir(place)
        scenes = (
            "--count 4 --shard-size 4 --seed 2026 --output shards/shapes"  # what is there is read
        )
        assert main(["shards", "shapes", "--workers", "1", *scenes.split()]) == 0
        Image.new("RGB", (60, 40), "red").save("cat.jpg")
        yield place


def id_of(page):
    return str(page.relative_to(ROOT))


def run(words):
    """Run a command of ours as it stands, but small."""
    line = " ".join(words)
    small = [w for known, more in SMALL.items() if f" {known}" in f" {line}" for w in more]
    if "--dry-run" in words or (words[1:2] and words[1].endswith(".json")):
        small = []
    assert main([*words, *small]) == 0, line


def check(words):
    """Whether a command of ours would be understood."""
    name, *rest = words
    if name == "predict":
        with pytest.raises(SystemExit) as left:
            main([*words, "--print_config"])
        assert left.value.code == 0
    elif name == "shards" and rest[0] not in ("verify",):
        shards.dataset_parser(rest[0]).parse_args(rest[1:])
    elif name == "shards":
        shards.verify_parser().parse_args(rest[1:])
    elif name == "reproduce":
        assert main([*words, "--dry-run"]) == 0
    elif name == "app":
        app.arguments().parse_args(rest)
    else:
        raise AssertionError(f"lightning {name} needs nothing: let it run")


def run_or_check(words, needs):
    """Run one command of a block, or check it where it needs what isn't here."""
    program, *rest = words
    if program == "lightning":
        for name in RUNS.keys() & set(rest[1:]) if rest[0] != "predict" else ():
            if not Path(name).exists():
                run(RUNS[name])
        (check if needs else run)(rest)
    elif program in ("sbatch", "python"):
        script = next(word for word in rest if not word.startswith("-"))
        assert needs
        assert rest[0] == "-m" or (ROOT / script).is_file(), script
    elif program == "torchrun":
        assert needs
        check(rest[rest.index("lightning") + 1 :])
    elif program == "tar":
        assert subprocess.run(words, capture_output=True, check=True).stdout
    else:
        assert program in ELSEWHERE, words


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_its_commands_and_python_run(page, folder, capsys):
    for language, needs, text in blocks(page):
        assert needs <= NEEDS
        if language == "sh":
            for words in commands(text):
                run_or_check(words, needs)
        else:
            exec(text.replace('"ViT-B-16", pretrained="openai"', '"demo", pretrained="demo"'), {})
            if "cat_explained" in text:
                assert Image.open("cat_explained.png").width % (3 * 60) == 0


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_its_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.M)
    for target in re.findall(r"\]\((?!\w+:|#)([^)\s#]+)", text):
        assert (page.parent / target).exists(), target


def test_fields_and_commands_that_are_named_exist():
    def arguments(*classes):
        return {
            name
            for cls in classes
            for base in cls.__mro__
            if "__init__" in vars(base)
            for name in inspect.signature(base).parameters
        }

    fields = {
        "model": arguments(*(getattr(tasks, cls) for cls in tasks.TASKS.values())),
        "data": arguments(*(getattr(datamodules, cls) for cls in datamodules.DATASETS.values())),
        "writer": arguments(tasks.ResultWriter),
        "trainer": arguments(Trainer),
    }
    backbone = arguments(tasks.BackboneConfig)
    recipe = {"name", *typing.get_type_hints(surgery.Recipe)}
    named = set()
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # it also says what there was
            continue
        text = page.read_text()
        for section, field in re.findall(r"--(model|data|writer|trainer)\.([a-z_.]*\w)", text):
            first, *below = field.split(".")
            assert first in fields[section], f"{page.name}: --{section}.{field}"
            if first == "backbone" and below:
                assert below[0] in backbone, f"{page.name}: --{section}.{field}"
                assert set(below[1:]) <= recipe, f"{page.name}: --{section}.{field}"
            named.add((section, first))
        for command in re.findall(r"`lightning ([a-z]+)", text):
            assert command in COMMANDS, f"{page.name}: lightning {command}"
    assert {section for section, _ in named} == set(fields)


def test_every_metric_is_defined():
    text = (ROOT / "docs/metrics.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.M))
    assert set(sections) == set(MEANINGS)
    for task, section in sections.items():
        rows = re.findall(r"^\| (`.*?) \|", section, re.M)
        names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
        assert len(set(names)) == len(names)
        assert not [name for name in names if not meaning_of(task, name)]
        for pattern in MEANINGS[task]:
            assert any(re.fullmatch(pattern, name) for name in names), pattern
