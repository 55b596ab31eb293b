"""The training benchmark: both sides do the same work, counts are right, the JSON keeps its shape."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fork_server import ForkServer

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "bench_train.py"


@pytest.fixture(scope="module")
def bench_train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_train", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_train"] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def settings(bench_train: ModuleType, *arguments: str) -> Any:
    small = ["--device", "cpu", "--encoder", "vitn", "--image-size", "56", "--batch", "3"]
    return bench_train.parse([*small, *arguments])[0]


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_both_sides_have_the_same_loss_and_gradients(
    bench_train: ModuleType, tmp_path: Path, stage: str
) -> None:
    bench = bench_train.build(settings(bench_train, "--stage", stage), tmp_path)
    network, recipe = bench.module.model, bench.module.recipe
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    plain = bench_train.plain_step(
        network, optimizer, bench.batch, recipe, precision="32-true", frozen=bench.frozen
    )
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    optimizer.zero_grad()
    loss = bench.module.training_step(bench.batch, 0)
    loss.backward()
    bench.module.configure_gradient_clipping(optimizer)
    torch.testing.assert_close(plain, loss.detach())
    assert set(bench.module.parts[0]) >= ({"alignment"} if stage == "student" else {"ssi", "gm"})
    for name, p in network.named_parameters():
        torch.testing.assert_close(gradients.get(name), p.grad)


def test_the_recipe_is_the_papers(bench_train: ModuleType, tmp_path: Path) -> None:
    module = bench_train.build(settings(bench_train, "--stage", "student"), tmp_path).module
    assert (module.recipe.trim, module.recipe.gm_weight, module.recipe.clip_norm) == (0.1, 2.0, 1.0)


def dpt_flops(side: int, *, patch: int, width: int, features: int, out: tuple[int, ...]) -> int:
    """Count the head's convolutions by hand: twice the weights' values for each place they are applied at."""
    sides = (4 * side, 2 * side, side, (side + 1) // 2)
    macs = sum(side**2 * width * channels for channels in out)
    macs += side**2 * (16 * out[0] ** 2 + 4 * out[1] ** 2) + sides[3] ** 2 * 9 * out[3] ** 2
    macs += sum(s**2 * 9 * channels * features for s, channels in zip(sides, out, strict=True))
    units = 2 * 9 * features**2  # a residual unit has two convolutions; the coarsest level lacks one unit
    macs += units * (sides[3] ** 2 + 2 * sum(s**2 for s in sides[:3]))
    macs += features**2 * sum(s**2 for s in sides)  # the head mixes channels before the step up, not after
    macs += (2 * sides[0]) ** 2 * 9 * features * (features // 2)
    macs += (patch * side) ** 2 * (9 * features // 2 * 32 + 32)
    return 2 * macs


@pytest.mark.parametrize("image_size", [56, 98])
def test_flops_are_those_of_the_formula(bench_train: ModuleType, image_size: int) -> None:
    patch, width, depth = 7, 96, 4
    side = image_size // patch
    tokens = side**2 + 1
    encoder = 2 * side**2 * 3 * patch**2 * width
    encoder += depth * (24 * tokens * width**2 + 4 * tokens**2 * width)  # the second term is attention's
    forward = encoder + dpt_flops(side, patch=patch, width=width, features=32, out=(12, 24, 48, 96))
    counted = bench_train.count_flops("vitn", image_size)
    assert counted["forward"] == forward
    assert 2.9 * forward < counted["step"] < 3 * forward
    aligned = bench_train.count_flops("vitn", image_size, aligned=True)
    assert aligned["step"] - counted["step"] == encoder


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H20", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("AMD EPYC", None),
    ],
)
def test_peaks(bench_train: ModuleType, name: str, peak: float | None) -> None:
    assert bench_train.peak_tflops(name) == peak


def test_a_side_is_summed_up(bench_train: ModuleType) -> None:
    chosen = settings(bench_train, "--batch", "10", "--steps", "4")
    windows = [bench_train.Window(seconds, 0.5, gib) for seconds, gib in ((1.0, 3.0), (2.0, 5.0), (4.0, 4.0))]
    numbers = bench_train.side(windows, chosen, flops=10**12, peak=100.0)
    assert numbers["images_per_s"] == {"median": 20.0, "iqr": 15.0, "values": [40.0, 20.0, 10.0]}
    assert numbers["data_wait"]["median"] == 0.25
    assert numbers["mfu"] == pytest.approx(0.2) and numbers["peak_gib"] == 5.0
    assert bench_train.side(windows, chosen, flops=10**12, peak=None)["mfu"] is None


def test_windows_alternate_and_the_device_is_waited_for_at_their_ends_only(
    bench_train: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Watch:
        def __init__(self, device: str) -> None: ...

        def start(self) -> None:
            told.append("start")

        def stop(self, *, wait_s: float = 0.0) -> str:
            told.append("stop")
            return f"window {len(told)}"

    monkeypatch.setattr(bench_train, "Stopwatch", Watch)
    bench: Any = SimpleNamespace(
        settings=settings(bench_train, "--steps", "2", "--repeats", "2", "--warmup", "3")
    )
    turns = bench_train.TakeTurns(bench, lambda optimizer: told.append("plain"))
    trainer: Any = SimpleNamespace(optimizers=["optimizer"], should_stop=False)
    module: Any = SimpleNamespace(parts=[])
    turns.on_train_start(trainer, module)
    while not trainer.should_stop:
        turns.on_train_batch_start(trainer, module, None, 0)
        told.append("own")
        turns.on_train_batch_end(trainer, module, None, None, 0)
    plain = ["start", "plain", "plain", "stop"]
    warmup = ["own"] * 3 + ["start", *["plain"] * 3, "stop"]
    assert told[:-1] == warmup + (["start", "own", "own", "stop"] + plain) * 2
    assert len(turns.own) == len(turns.others) == 2 and not set(turns.own) & set(turns.others)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image-size", "57"], "multiple of 14"),
        (["--stage", "student", "--shards", "data/x"], "--stage teacher"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    bench_train: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        bench_train.parse(arguments)
    assert said in capsys.readouterr().err


def numbers(values: dict[str, Any], count: int) -> None:
    assert set(values) == {"median", "iqr", "values"} and len(values["values"]) == count
    assert all(math.isfinite(value) and value >= 0 for value in values["values"])
    assert min(values["values"]) <= values["median"] <= max(values["values"])


def test_the_json_keeps_its_shape(tmp_path: Path, fork_server: ForkServer) -> None:
    output = tmp_path / "new" / "train.json"
    small = "--device cpu --encoder vitn --image-size 56 --batch 2 --steps 2 --repeats 2 --warmup 1".split()
    done = fork_server.run([sys.executable, str(SCRIPT), *small, "--output", str(output)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: no peak is known") == 1
    result = json.loads(output.read_text())
    assert list(result) == [
        "benchmark",
        "version",
        "metadata",
        "settings",
        "network",
        "sides",
        "ratio_to_plain",
        "peak_rss_gib",
    ]
    assert (result["benchmark"], result["version"]) == ("train", 1)
    assert set(result["metadata"]) == set(
        "commit uncommitted command date device threads python torch cuda pytorch_lightning timm".split()
    )
    assert result["metadata"]["command"].endswith(" ".join([*small, "--output", str(output)]))
    assert result["settings"]["encoder"] == "vitn" and result["settings"]["precision"] == "32-true"
    assert result["network"]["parameters"] > 0 and result["network"]["peak_bf16_tflops"] is None
    assert set(result["network"]["flops_per_image"]) == {"forward", "step"}
    assert list(result["sides"]) == ["plain", "step", "run"]
    for name, side in result["sides"].items():
        assert set(side) == {"images_per_s", "data_wait", "mfu", "peak_gib"}
        assert side["mfu"] is None and side["peak_gib"] is None
        for key in ("images_per_s", "data_wait"):
            numbers(side[key], 4 if name == "plain" else 2)
        assert side["images_per_s"]["median"] > 0
    assert set(result["ratio_to_plain"]) == {"step", "run"}
    for ratio in result["ratio_to_plain"].values():
        numbers(ratio, 2)
    assert 0 < result["peak_rss_gib"] < 1000
    assert f"teacher, vitn, 56 px, batch 2, 32-true, {result['metadata']['device']}" in done.stdout
    assert list(tmp_path.iterdir()) == [output.parent]  # the run's own folder is gone
