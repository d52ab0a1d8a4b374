"""The script that lets a shell complete commands."""

import subprocess
import sys

from tasks.__main__ import main


def test_completion_in_bash(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    lines = {
        "lightning repr": "reproduce",
        "lightning predict --model Seg": "Segmentation",
        "lightning predict --model.backbone.atten": "--model.backbone.attention",
        "lightning predict --model.backbone.attention nac": "naclip",
        "lightning predict --data.resize squ": "squash",
        "lightning predict --config vit_b16_nus": "vit_b16_nus_wide",
        "lightning shards voc --sour": "--source",
        "lightning list met": "methods",
    }
    ask = """
    source "$1"; shift
    for line in "$@"; do
        COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
        f=$(complete -p lightning | sed "s/.*-F \\([^ ]*\\).*/\\1/")
        $f lightning "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$COMP_CWORD - 1]}"
        echo "${COMPREPLY[0]}"
    done"""
    done = subprocess.run(
        ["bash", "-c", ask, "bash", str(script), *lines], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == list(lines.values())


def test_completion_without_shtab_says_how_to_have_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "zsh"]) == 1
    assert "clip-surgery-lightning[completion]" in capsys.readouterr().err
