import doctest
import importlib
import inspect

import numpy as np
import pytest
import torch

MODULES = ("geometry", "losses", "metrics", "preprocess", "visualize")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run_and_every_public_function_has_one(name):
    module = importlib.import_module(f"depth_anything.{name}")
    examples = {test.name.rpartition(".")[2]: test for test in doctest.DocTestFinder().find(module)}
    for function, value in inspect.getmembers(module, inspect.isfunction):
        if value.__module__ == module.__name__ and not function.startswith("_"):
            assert examples[function].examples, f"{name}.{function} has no example"
    result = doctest.testmod(module, extraglobs={"torch": torch, "np": np})
    assert result.attempted >= 1 and not result.failed
