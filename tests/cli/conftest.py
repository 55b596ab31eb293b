"""A small set and an untrained network, which the tests of every command share."""

import pytest

from depth_anything import DepthAnything, save_model
from depth_anything.cli import main


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    arguments = [
        "--look",
        "photographic",
        "--count",
        "6",
        "--seed",
        "7",
        "--size",
        "56",
        "70",
        "--per-shard",
        "4",
    ]
    assert main(["shard", "scenes", str(root), *arguments]) == 0
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A run's folder, finished."""
    run = tmp_path_factory.mktemp("runs") / "student-vitn-tiny"
    run.mkdir()
    save_model(DepthAnything("vitn"), run / "model.safetensors")
    (run / "config.yaml").write_text("stage: student\n")
    return run
