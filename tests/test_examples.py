"""The example notebooks run: their cells as they stand, each last line shown as Jupyter would."""

import ast
import json
import logging
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_and_shows_pictures(path, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIP_SURGERY_CACHE", str(tmp_path / "cache"))
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    space: dict = {}
    shown = []
    with caplog.at_level(logging.WARNING):
        for cell in cells:
            if cell["cell_type"] == "code":
                body = ast.parse("".join(cell["source"])).body
                last = body.pop() if isinstance(body[-1], ast.Expr) else None
                exec(compile(ast.Module(body, []), str(path), "exec"), space)
                if last is not None:
                    shown.append(
                        eval(compile(ast.Expression(last.value), str(path), "eval"), space)
                    )
    assert sum(hasattr(value, "_repr_html_") and "<img" in value._repr_html_() for value in shown)
    assert list(tmp_path.glob("*.png"))
    assert "teapot" in caplog.text  # the cell that says so is still true


def test_its_stored_pictures_are_there_and_nothing_of_a_machine():
    for path in EXAMPLES:
        text = path.read_text(encoding="utf-8")
        assert '"image/png"' in text
        assert "/home/" not in text
        assert "Traceback" not in text
