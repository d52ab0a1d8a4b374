"""The smallest data set that can be converted; processes that convert it import nothing else."""

import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules._convert import Source, sample_members
from datamodules._samples import DatasetInfo

INFO = DatasetInfo("toy", ("cat", "dog"))


def read(folder: Path, delay: float, name: str):
    time.sleep(delay)
    label = np.arange(16, dtype=np.uint8).reshape(4, 4) % 3
    return sample_members(INFO, name, folder / f"{name}.png", label)


def toy(folder: Path, count: int = 12, delay: float = 0.0) -> Source:
    """So many pictures, drawn where there is none yet; each takes so many seconds to be read."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        if not (folder / f"{i:03d}.png").exists():
            Image.new("RGB", (4, 4), (i, 2 * i, 3 * i)).save(folder / f"{i:03d}.png")
    return Source(INFO, "val", [f"{i:03d}" for i in range(count)], partial(read, folder, delay))
