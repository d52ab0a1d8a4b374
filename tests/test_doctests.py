"""The examples in the docstrings."""

import doctest
import logging
from importlib import import_module
from pkgutil import walk_packages

import pytest

import common
import datamodules
import surgery
import tasks

MODULES = [
    module.name
    for package in (common, datamodules, surgery, tasks)
    for module in walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
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
