"""Conceptual Captions 3M as img2dataset wrote it: its tars are read as they are."""

from __future__ import annotations

import json
from pathlib import Path

from datamodules._datamodule import ShardDataModule
from datamodules._remote import is_remote
from datamodules._samples import DatasetInfo

INFO = DatasetInfo(name="gcc3m", labels="none", captions=True)


class GCC3M(ShardDataModule):
    """Conceptual Captions (GCC3M): images with captions, straight from img2dataset's tars.

    Each ``00000.tar`` holds KEY.jpg, KEY.txt (the caption) and KEY.json; ``00000_stats.json`` beside
    it says how many. The paper explains captions word by word on it. With ``names``, any task that
    wants classes runs too.
    """

    info = INFO

    def lacking(self, need: str) -> str:
        """How to give what a task needs."""
        return 'say what to look for with --data.names "[cat, dog]"' if need == "classes" else ""

    def sample_counts(self) -> dict[str, int]:
        """Samples in each shard, as far as img2dataset's statistics beside it say."""
        counts = super().sample_counts()
        for name, url in self.shard_list():
            stats = Path(f"{url.removesuffix('.tar')}_stats.json")
            if name in counts or is_remote(url) or not stats.exists():
                continue
            try:
                counts[name] = int(json.loads(stats.read_text())["successes"])
            except (ValueError, KeyError, TypeError):
                continue  # only the time left is lost
        return counts
