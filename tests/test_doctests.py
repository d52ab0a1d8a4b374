"""The examples in the docstrings."""

import doctest
import logging
from importlib import import_module
from importlib.util import find_spec
from pkgutil import walk_packages

import pytest

import common
import datamodules
import surgery
import tasks

EXTRAS = {"tasks.app.page": "gradio"}
"""Modules that import what is not installed with the tests -> that."""

MODULES = [
    module.name
    for package in (common, datamodules, surgery, tasks)
    for module in walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__") and find_spec(EXTRAS.get(module.name, "common"))
]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = import_module(name)
    logging.disable(logging.WARNING)  # that random weights mean nothing
    try:
        assert doctest.testmod(module).failed == 0
    finally:
        logging.disable(logging.NOTSET)


def test_every_wing_has_examples():
    finder = doctest.DocTestFinder()
    found = [t.name for name in MODULES for t in finder.find(import_module(name)) if t.examples]
    assert len(found) >= 30
    assert {name.partition(".")[0] for name in found} == {
        *("common", "datamodules", "surgery", "tasks")
    }
