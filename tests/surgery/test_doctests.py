"""The examples in the docstrings of `surgery/`."""

import doctest
import logging
from importlib import import_module
from pkgutil import walk_packages

import pytest

import surgery

MODULES = [module.name for module in walk_packages(surgery.__path__, "surgery.")]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = import_module(name)
    logging.disable(logging.WARNING)  # that random weights mean nothing
    try:
        assert doctest.testmod(module).failed == 0
    finally:
        logging.disable(logging.NOTSET)


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    found = [t for name in MODULES for t in finder.find(import_module(name)) if t.examples]
    assert len(found) >= 20
