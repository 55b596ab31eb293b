import doctest
import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

MODULES = ("geometry", "losses", "metrics", "preprocess", "visualize")
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run_and_every_public_function_has_one(name):
    module = importlib.import_module(f"depth_anything.{name}")
    examples = {test.name.rpartition(".")[2]: test for test in doctest.DocTestFinder().find(module)}
    for function, value in inspect.getmembers(module, inspect.isfunction):
        if value.__module__ == module.__name__ and not function.startswith("_"):
            assert examples[function].examples, f"{name}.{function} has no example"
    result = doctest.testmod(module, extraglobs={"torch": torch, "np": np})
    assert result.attempted >= 1 and not result.failed


def test_examples_of_other_modules_run():
    failed, attempted = [], 0
    for path in sorted((ROOT / "depth_anything").rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "np": np})
            failed += [name] * result.failed
            attempted += result.attempted
    assert attempted > 60 and not failed
