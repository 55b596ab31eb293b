"""Files of an older version of this code are read, resumed and recognized (tests/fixtures/make_run_fixtures.py).

What is compared, and on which machines:

- Everywhere: the old checkpoint's structure, filled with the tensors that a run of today's code has at that step, is
  resumed by today's code and ends with the bytes of today's unbroken run. The losses agree with those of the old code
  to 5 %, as other processors round otherwise.
- Where the processor and the libraries compute as those that made the fixtures (`machine`, which uses no code of this
  project): every digest and every loss of the old code, to the last bit.
"""

import csv
import importlib.util
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from fork_server import ForkServer
from safetensors.torch import load_file

from depth_anything import load_model
from depth_anything.cli import main

ROOT = Path(__file__).resolve().parents[2]
Train = Callable[..., str]


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_run_fixtures", ROOT / "tests/fixtures/make_run_fixtures.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _load_script()
EXPECTED = json.loads((make.FIXTURES / "expected.json").read_text())
HALF_CHECKPOINT = f"step-{make.HALF:09d}.ckpt"


@pytest.fixture(scope="session")
def same_machine() -> bool:
    threads = torch.get_num_threads()
    try:
        return make.machine() == EXPECTED["machine"]
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with the old sets and the old model file."""
    shutil.copytree(make.FIXTURES / "sets", tmp_path / "data")
    packed = (make.FIXTURES / "relative.safetensors.xz").read_bytes()
    (tmp_path / "relative.safetensors").write_bytes(lzma.decompress(packed))
    return tmp_path


def old_run(stage: str, folder: Path, tensors: dict[str, torch.Tensor]) -> tuple[Path, Path]:
    """Put an old run folder where its command looks for it, its checkpoint filled with tensors."""
    run = folder / make.run_folder(stage)
    shutil.copytree(make.FIXTURES / "runs" / run.name, run)
    checkpoint = run / "checkpoints" / HALF_CHECKPOINT
    packed = checkpoint.with_name(f"{checkpoint.name}.xz")
    checkpoint.write_bytes(lzma.decompress(packed.read_bytes()))
    packed.unlink()
    content = make.read_checkpoint(checkpoint)
    assert make.flatten(content).keys() == tensors.keys()
    torch.save(make.fill(content, tensors), checkpoint)
    return run, checkpoint


@pytest.fixture
def train(folder: Path, fork_server: ForkServer) -> Train:
    """Return a function that runs train.py with arguments in the folder and returns its output."""
    return lambda *arguments: make.train(ROOT, folder, list(arguments), run=fork_server.run)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read metrics.csv."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def refused(train: Train, *arguments: str) -> str:
    with pytest.raises(RuntimeError) as error:
        train(*arguments)
    return str(error.value).partition("\n")[2]


@pytest.mark.parametrize("stage", make.FITTED)
def test_an_old_run_is_resumed_and_ends_as_the_unbroken_run(
    stage: str, folder: Path, same_machine: bool, train: Train
) -> None:
    expected = EXPECTED["stages"][stage]
    command = expected["command"]
    run = folder / make.run_folder(stage)
    # A new run of size=tiny has other random weights today.
    train(*(command if stage == "metric" else [*command, "init=null"]))
    unbroken = run.rename(run.with_name("unbroken"))
    half = make.flatten(make.read_checkpoint(unbroken / "checkpoints" / HALF_CHECKPOINT))
    weights = load_file(unbroken / "model.safetensors")

    # Today's code trains as the old code did.
    losses = make.losses(unbroken / "metrics.csv")
    sums = {name: float(tensor.double().sum()) for name, tensor in weights.items()}
    assert sums.keys() == expected["sums"].keys()
    if same_machine:
        assert losses == expected["losses"]
        assert make.tensors_digest(half) == expected["half"]
        assert make.tensors_digest(weights) == expected["model"]
    for row, old in zip(losses, expected["losses"], strict=True):
        np.testing.assert_allclose(row, old, rtol=0.05)
    for name, value in sums.items():
        assert value == pytest.approx(expected["sums"][name], rel=0.05, abs=1.0), name

    # The old run folder is the same run, and goes on from its checkpoint.
    _, checkpoint = old_run(stage, folder, half)
    old_rows = read_rows(run / "metrics.csv")
    assert "recipe.head_lr" in refused(train, *command, "recipe.head_lr=0.125")
    content = make.read_checkpoint(checkpoint)
    (state,) = (value for value in content.values() if isinstance(value, dict) and "samples" in value)
    (name,), state["sets"] = state["sets"], dict.fromkeys(state["sets"], "sha256:0")
    torch.save(content, checkpoint)
    assert name.rpartition("/")[2] in refused(train, *command)  # other data than the old run's
    shutil.rmtree(run)
    old_run(stage, folder, half)
    train(*command)
    rows = read_rows(run / "metrics.csv")  # with more columns than the old version wrote
    assert [{name: row[name] for name in old} for row, old in zip(rows, old_rows, strict=False)] == old_rows
    assert make.losses(run / "metrics.csv")[make.HALF :] == losses[make.HALF :]
    assert (run / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    ends = [
        make.flatten(make.read_checkpoint(one / "checkpoints" / f"step-{make.STEPS:09d}.ckpt"))
        for one in (run, unbroken)
    ]
    assert make.tensors_digest(ends[0]) == make.tensors_digest(ends[1])
    assert "finished" in train(*command)

    # Nothing of the old sets was written again.
    for key, digest in EXPECTED["files"].items():
        assert make.hashlib.sha256((folder / "data" / key).read_bytes()).hexdigest() == digest, key


def test_an_old_pseudolabel_run_goes_on_and_labels_with_the_same_bytes(
    folder: Path, same_machine: bool, train: Train
) -> None:
    labels = folder / "data" / "labels-tiny" / "scenes-photographic"
    run = folder / make.run_folder("pseudolabel")
    shutil.copytree(make.FIXTURES / "runs" / run.name, run)
    kept = {path.name: path.read_bytes() for path in labels.iterdir()}
    for name in ("00001.tar", "00001.idx", "00001.json", "manifest.json"):
        (labels / name).unlink()
    done = (labels / "00000.tar").stat().st_mtime_ns
    command = EXPECTED["stages"]["pseudolabel"]["command"]
    train(*command)
    assert (labels / "00000.tar").stat().st_mtime_ns == done, "the finished shard was labelled again"
    assert sorted(path.name for path in labels.iterdir()) == sorted(kept)
    if same_machine:
        assert {path.name: path.read_bytes() for path in labels.iterdir()} == kept
    old = json.loads(kept["manifest.json"])
    assert json.loads((labels / "manifest.json").read_text()).keys() == old.keys()
    assert "codec" in refused(train, *command, "data.codec=f32")  # other labels than those that are there


def test_old_sets_are_verified_and_drawn_again_with_the_same_bytes(
    folder: Path, same_machine: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for name in (
        "scenes-synthetic",
        "scenes-photographic",
        "scenes-validation",
        "labels-tiny/scenes-photographic",
    ):
        assert main(["verify", f"data/{name}", "--decode"]) == 0, capsys.readouterr().out
    command = [
        "shard",
        "scenes",
        "again/scenes-synthetic",
        "--look",
        "synthetic",
        "--count",
        "8",
        "--seed",
        "1",
    ]
    assert main([*command, "--size", "28", "42", "--per-shard", "4"]) == 0
    again, old = Path("again/scenes-synthetic"), Path("data/scenes-synthetic")
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in old.iterdir())
    if same_machine:
        for path in old.iterdir():
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_old_model_file_is_read(folder: Path, same_machine: bool) -> None:
    model = load_model(folder / "relative.safetensors")
    assert (model.quantity, model.max_depth) == ("disparity", None)
    values: list[Any] = [value for value in model.state_dict().values() if value.ndim > 1]
    assert all(torch.equal((value * 32).round() / 32, value) for value in values)
