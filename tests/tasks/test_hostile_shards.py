"""Shards of a stranger: nothing in them runs, or writes outside of the run's folder."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from tests.tasks.conftest import add, members


def test_nothing_a_stranger_put_in_a_shard_runs_or_writes_outside(scenes, predict, tmp_path):
    good = members(scenes / "000000.tar")

    def sample(tar: tarfile.TarFile, key: str, **replaced: bytes) -> None:
        for ending in ("png", "label.png", "json", "txt"):
            data = replaced.get(ending.replace(".", "_"), good[f"00000000.{ending}"])
            add(tar, f"{key}.{ending}", data)

    bomb = io.BytesIO()
    Image.fromarray(np.zeros((1, 1), bool)).resize((20000, 20000)).save(bomb, "PNG")
    wrong = io.BytesIO()
    Image.fromarray(np.full((64, 64), 77, np.uint8)).save(wrong, "PNG")
    small = io.BytesIO()
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(small, "PNG")
    pwned = tmp_path / "PWNED"
    pickled = b"cos\nsystem\n(S'touch " + str(pwned).encode() + b"'\ntR."
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "000000.tar", "w") as tar:
        sample(tar, "good")
        sample(tar, "../up")
        sample(tar, "/abs")
        sample(tar, "a/../../b")
        sample(tar, "__shard__/record")
        sample(tar, "k" * 250)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        sample(tar, "pickle")
        add(tar, "pickle.pkl", pickled)
        add(tar, "pickle.pyd", pickled)
        sample(tar, "bomb", png=bomb.getvalue())
        sample(tar, "range", label_png=wrong.getvalue())
        sample(tar, "size", label_png=small.getvalue())
        sample(tar, "caption", txt=b"x" * (2 << 20))
        sample(tar, "list", json=b"[1]")
        sample(tar, "notjson", json=b"{")
        sample(tar, "good")
    run = predict(tmp_path / "runs" / "run", f"--data.shards={folder}", "--data.max_error_rate=1")
    listed = [json.loads(line) for line in (run / "errors.jsonl").read_text().splitlines()]
    bad = {error["key"][:8] for error in listed}
    expected = ("../up", "/abs", "a/../../", "__shard_", "k" * 8, "link", "bomb", "range", "size")
    assert bad == {*expected, "caption", "list", "notjson", "good"}
    summary = json.loads((run / "metrics.json").read_text())
    assert (summary["images"], summary["errors"]) == (2, len(listed))
    assert not pwned.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs", "shards"]
    assert {name.split(".")[0] for name in members(run / "000000.tar")} == {
        "good",
        "pickle",
        "__shard__/record",
        "__shard__/metrics",
    }
