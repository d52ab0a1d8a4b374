"""The README's Python runs as it stands, on the demo's CLIP in place of one that is downloaded."""

import re
from pathlib import Path

from PIL import Image

from tasks.__main__ import main

README = Path(__file__).parents[1] / "README.md"


def test_its_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 40), "red").save("cat.jpg")
    assert main(["predict", "--config", "demo.yaml", "--data.scenes=4"]) == 0
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block.replace('"ViT-B-16", pretrained="openai"', '"demo", pretrained="demo"'), {})
    assert Image.open("cat_explained.png").width % (3 * 60) == 0
