"""Stored answers of the reference repositories, for tiny random networks."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from surgery import load_backbone
from surgery.backbone import Backbone

REFERENCE = Path(__file__).parent / "reference"


@cache
def arrays(name: str) -> dict[str, Tensor]:
    with np.load(REFERENCE / f"{name}.npz") as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads only get in each other's way on networks this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, Tensor]]:
    """`reference("vit")`: the arrays of one file, by name."""
    return arrays


@pytest.fixture(scope="session")
def network() -> Callable[..., Backbone]:
    """`network("vit", attention="raw")`: a backbone with the stored weights; do not change it."""

    @cache
    def load(kind: str, **options) -> Backbone:
        return load_backbone(
            REFERENCE / f"{kind}.json", REFERENCE / f"{kind}.safetensors", **options
        )

    return load


@pytest.fixture(scope="session")
def texts() -> Tensor:
    """Features [9, 64] of texts, of the ViT."""
    return arrays("vit")["text_features"]


@pytest.fixture
def folder() -> Path:
    return REFERENCE


@pytest.fixture
def weights(folder) -> dict[str, Tensor]:
    """Those of the ViT in float32, to be changed at will."""
    return {name: value.float() for name, value in load_file(folder / "vit.safetensors").items()}


@pytest.fixture
def config(folder) -> str:
    """The file that describes the ViT."""
    return str(folder / "vit.json")
