"""How the tests run: side by side, in a process for each core, each of one thread."""

import os
from pathlib import Path

import pytest

# Before torch is imported: the networks are tiny, and threads would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_MOST = 4  # processes; each takes some 3 GB, and has fixtures of its own to make


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """As many processes as cores for folders of tests; none but this one for single files."""
    if all(Path(word.partition("::")[0]).is_file() for word in config.args):
        return 0
    mine = getattr(os, "sched_getaffinity", None)  # a container or a job may have some of the cores
    return min(len(mine(0)) if mine else os.cpu_count() or 1, _MOST)
