"""Steps that are not finite are skipped alike on all ranks, reported with their samples, and end a run after three."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from tiny_training import BatchList, make_batch, make_module, make_trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from depth_anything.errors import UserError
from depth_anything.training.base import DepthModule
from depth_anything.training.callbacks import GracefulStop, PauseEnd, StepCallback, TrainingMetrics
from depth_anything.training.checkpoints import Checkpoints
from depth_anything.training.ema import EMA
from depth_anything.training.guards import StepGuards
from depth_anything.training.headroom import CheckpointSchedule, Headroom
from depth_anything.training.lightning import raise_if_incomplete
from depth_anything.training.metric import Metric
from depth_anything.training.optimizer import learning_rate_factor
from depth_anything.training.prediction_scale import PredictionScale
from depth_anything.training.pretrain import Pretrain
from depth_anything.training.segmentation import Segmentation
from depth_anything.training.spikes import LossWindow
from depth_anything.training.step_guard import use_fused_kernel
from depth_anything.training.student import Student
from depth_anything.training.teacher import Teacher

pytestmark = pytest.mark.usefixtures("one_thread")
BATCHES = 8


def make_bad_batch(seed: int, way: str) -> dict[str, Any]:
    """Build a micro-batch whose loss or gradient is not finite; its second image is at fault."""
    batch = make_batch(seed)
    batch["sample"] = torch.tensor([2 * seed, 2 * seed + 1])
    if way == "target":
        batch["target"][1, 3, 3] = torch.nan
    return batch | {"way": way}


class FaultyModule(DepthModule):
    """A module whose loss follows the batch's "way"."""

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        way, given = batch.get("way"), self.inputs(batch)
        if way == "prediction":
            given["image"] = given["image"] * torch.tensor([1.0, torch.inf])[:, None, None, None]
        prediction = self.model(given["image"])
        loss = (prediction - given["target"]).square().mean()
        if way == "infinite loss":  # its gradient is zero
            loss = loss * 0.0 + torch.inf
        if way == "gradient":  # sqrt at zero: finite, with an infinite gradient
            loss = loss + (prediction[1] - prediction[1].detach()).abs().sum().sqrt()
        return {"loss": loss * batch.get("factor", 1.0)}


def faulty_module(**recipe: Any) -> FaultyModule:
    module = make_module(**recipe)
    return FaultyModule(module.model, module.recipe)


def numbered(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**batch, "sample": torch.tensor([2 * i, 2 * i + 1])} for i, batch in enumerate(batches)]


class FusedOnCPU(StepGuards):
    """Lets the CPU's fused kernel skip, as on a GPU."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        super().on_train_start(trainer, module)
        assert use_fused_kernel(trainer.optimizers[0])
        module.step_guard.on_device = True


def train(
    folder: Path,
    batches: list[dict[str, Any]],
    *,
    guards: StepGuards | None = None,
    every: int = 4,
    accumulate: int = 1,
    begin: int = 0,
    steps: int | None = None,
    added: tuple[Any, ...] = (),
    save_every: int = 3,
    advice: str = "",
    accelerator: str = "cpu",
    precision: str = "32-true",
    **recipe: Any,
) -> Any:
    """Train on a list of micro-batches with the callbacks of a run; return trainer, module and guards."""
    folder.mkdir(exist_ok=True)
    guards = guards or StepGuards(folder, every=every, advice=advice)
    checkpoints = Checkpoints(folder / "checkpoints", every=save_every)
    metrics = TrainingMetrics(every=every, batch_size=2, run_dir=folder)
    callbacks = [guards, metrics, *added, checkpoints, GracefulStop(checkpoints), PauseEnd(metrics)]
    steps = steps or len(batches) // accumulate
    trainer = make_trainer(
        folder, *callbacks, steps=steps, accumulate=accumulate, precision=precision, accelerator=accelerator
    )
    checkpoint = folder / f"checkpoints/step-{begin:09d}.ckpt" if begin else None
    module = faulty_module(steps=len(batches) // accumulate, **recipe)
    loader = DataLoader(BatchList(batches[begin * accumulate :]), batch_size=None)
    trainer.fit(module, train_dataloaders=loader, ckpt_path=checkpoint)
    raise_if_incomplete(trainer, callbacks)
    return trainer, module, guards


def plain(value: Any) -> Any:
    """Return a state with lists in place of tensors, which == compares."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, Tensor) else value


def weights(module: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.model.parameters()])


def plain_reference(
    batches: list[Any], *, skipped: set[int], schedule: str, steps: int
) -> tuple[Tensor, Any]:
    """Train with a plain loop of torch, in which the skipped steps only advance the schedule."""
    module = faulty_module(schedule=schedule, steps=steps)
    groups = [
        {"params": list(module.model.encoder_parameters())},
        {"params": list(module.model.head_parameters())},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=1e-3, betas=(0.9, 0.999), weight_decay=module.recipe.weight_decay
    )
    for step, batch in enumerate(batches):
        if step in skipped:
            continue
        for group in optimizer.param_groups:
            factor = learning_rate_factor(step, steps=steps, warmup=module.recipe.warmup, schedule=schedule)
            group["lr"] = 1e-3 * factor
        optimizer.zero_grad()
        module.losses(batch)["loss"].backward()
        if module.recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_(module.model.parameters(), module.recipe.clip_norm)
        optimizer.step()
    return weights(module), optimizer


@pytest.mark.parametrize("way", ["target", "prediction", "infinite loss", "gradient"])
@pytest.mark.parametrize("kernel", ["host", "fused"])
def test_a_step_that_is_not_finite_is_skipped_exactly(tmp_path: Path, way: str, kernel: str) -> None:
    """Weights, moments and Adam's own step count are those of a loop that leaves the batch out."""
    batches = numbered([make_batch(seed) for seed in range(BATCHES)])
    batches[3] = {**make_bad_batch(3, way), "sample": batches[3]["sample"]}
    made = FusedOnCPU(tmp_path, every=4) if kernel == "fused" else None
    trainer, module, guards = train(tmp_path, batches, guards=made, schedule="linear")
    expected, optimizer = plain_reference(batches, skipped={3}, schedule="linear", steps=BATCHES)
    if kernel == "host":
        assert torch.equal(weights(module), expected)
    else:
        torch.testing.assert_close(weights(module), expected)
    counts = [float(state["step"]) for state in trainer.optimizers[0].state.values()]
    assert counts == [BATCHES - 1] * 4 and guards.skipped == 1 and trainer.global_step == BATCHES
    (line,) = map(json.loads, (tmp_path / "skipped-steps.jsonl").read_text().splitlines())
    assert (line["step"], line["rank"], line["samples"]) == (4, 0, [6, 7])
    causes = {"target": "target", "prediction": "prediction", "infinite loss": "loss", "gradient": "gradient"}
    assert line["cause"] == causes[way]
    named = ["sample 6", "sample 7"] if way == "infinite loss" else ["sample 7"]
    assert line["records"] == named


def test_a_bad_micro_batch_skips_the_whole_accumulated_step(tmp_path: Path) -> None:
    batches = numbered([make_batch(seed) for seed in range(BATCHES)])
    batches[4] = {**make_bad_batch(4, "infinite loss"), "sample": batches[4]["sample"]}
    good = [batch for i, batch in enumerate(batches) if i not in (4, 5)]
    _, module, _ = train(tmp_path / "a", batches, accumulate=2)
    _, reference, _ = train(tmp_path / "b", good, accumulate=2)
    assert torch.equal(weights(module), weights(reference))
    (line,) = map(json.loads, (tmp_path / "a/skipped-steps.jsonl").read_text().splitlines())
    assert (line["step"], line["samples"]) == (3, [8, 9])


def test_a_step_is_skipped_in_bf16_too(tmp_path: Path) -> None:
    batches = numbered([make_batch(seed) for seed in range(6)])
    batches[3]["target"][0, 0, 0] = torch.nan
    good = [*batches[:3], *batches[4:]]
    _, module, guards = train(tmp_path / "a", batches, precision="bf16-mixed")
    _, reference, _ = train(tmp_path / "b", good, precision="bf16-mixed")
    assert torch.equal(weights(module), weights(reference)) and guards.skipped == 1


@pytest.mark.parametrize("broken_at", [3, 6])
def test_a_run_with_a_skipped_step_resumes_exactly(tmp_path: Path, broken_at: int) -> None:
    batches = numbered([make_batch(seed) for seed in range(BATCHES)])
    batches[4]["target"][1, 0, 0] = torch.nan
    unbroken, module, guards = train(tmp_path / "a", batches, schedule="linear", steps=BATCHES)
    train(tmp_path / "b", batches, schedule="linear", steps=broken_at)
    again, resumed, _ = train(tmp_path / "b", batches, begin=broken_at, schedule="linear", steps=BATCHES)
    assert torch.equal(weights(resumed), weights(module))
    saved = [torch.load(tmp_path / name / f"checkpoints/step-{BATCHES:09d}.ckpt") for name in ("a", "b")]
    for key in ("optimizer_states", "lr_schedulers"):
        assert plain(saved[0][key]) == plain(saved[1][key])
    assert saved[0]["callbacks"]["StepGuards"] == saved[1]["callbacks"]["StepGuards"]
    lines = [(tmp_path / name / "skipped-steps.jsonl").read_text() for name in ("a", "b")]
    assert lines[0] == lines[1] and lines[0].count("\n") == 1


def test_a_checkpoint_between_two_log_lines_has_the_steps_before_it(tmp_path: Path) -> None:
    batches = numbered([make_batch(seed) for seed in range(5)])
    batches[1]["target"][0, 0, 0] = torch.nan
    train(tmp_path / "a", batches, every=100)
    saved = torch.load(tmp_path / "a" / "checkpoints/step-000000003.ckpt")
    assert saved["callbacks"]["StepGuards"]["skipped"] == 1


def test_three_skipped_steps_in_a_row_stop_the_run_which_then_continues_after_them(tmp_path: Path) -> None:
    """The run stops across a restart, with finite weights; the same command continues with the next samples."""
    batches = numbered([make_batch(seed) for seed in range(12)])
    for i in (2, 3, 4):
        batches[i]["target"][0, 0, 0] = torch.nan
    _, before, _ = train(tmp_path / "before", batches[:2])
    folder = tmp_path / "run"
    _, _, guards = train(folder, batches, steps=3, advice="type lower rates")
    assert guards.skipped == 1
    with pytest.raises(
        UserError, match=r"3 steps in a row.* step 5\b.*skipped-steps.* step 2\b.*lower rates"
    ):
        train(folder, batches, begin=3, steps=12, advice="type lower rates", every=5)
    stopped = torch.load(folder / "checkpoints/step-000000005.ckpt")
    saved = torch.cat([v.flatten() for k, v in stopped["state_dict"].items() if k.startswith("model.")])
    assert torch.equal(saved, weights(before))
    trainer, _, guards = train(folder, batches, begin=5, steps=12)
    assert trainer.global_step == 12 and guards.skipped == 3 and guards.failure is None
    steps = [json.loads(line)["step"] for line in (folder / "skipped-steps.jsonl").read_text().splitlines()]
    assert steps == [3, 4, 5]


def test_other_limits_of_skipped_steps(tmp_path: Path) -> None:
    batches = numbered([make_batch(seed) for seed in range(8)])
    for i in (2, 3, 5):
        batches[i]["target"][0, 0, 0] = torch.nan
    _, _, guards = train(tmp_path / "a", batches)
    assert guards.skipped == 3
    with pytest.raises(UserError, match="2 steps in a row"):
        train(tmp_path / "b", batches, guards=StepGuards(tmp_path / "b", every=4, max_skipped=2))


def test_weights_that_are_not_finite_are_not_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(FaultyModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                self.model.depth_head.weight.data[0, 1] = torch.inf

    checkpoints = Checkpoints(tmp_path / "checkpoints", every=3)
    module = make_module()
    trainer = make_trainer(tmp_path, checkpoints, steps=6)
    loader = DataLoader(BatchList(numbered([make_batch(seed) for seed in range(6)])), batch_size=None)
    with pytest.raises(UserError, match=r"depth_head\.weight|step 6"):
        trainer.fit(Broken(module.model, module.recipe), train_dataloaders=loader)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000003.ckpt"]
    assert "not saved" not in capsys.readouterr().err  # the error that is raised says so


@pytest.mark.parametrize("factor", [10.0, 1e8])
@pytest.mark.parametrize("spike", ["warn", "skip"])
def test_a_loss_far_above_the_usual_is_reported(
    tmp_path: Path, factor: float, spike: str, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = numbered([make_batch(seed) for seed in range(20)])
    batches[16]["factor"] = factor
    guards = StepGuards(tmp_path, every=5, spike=spike)
    trainer, module, _ = train(tmp_path, batches, guards=guards, every=5)
    (line,) = map(json.loads, (tmp_path / "loss-spikes.jsonl").read_text().splitlines())
    assert line["step"] == 17 and line["samples"] == [32, 33] and line["loss"] > factor * 0.01
    printed = capsys.readouterr().err
    assert printed.count("step 17") == 1 and "sample 32" in printed
    assert guards.skipped == (spike == "skip")
    good = [*batches[:16], *batches[17:]] if spike == "skip" else batches
    _, reference, _ = train(tmp_path / "b", good, guards=StepGuards(tmp_path / "b", every=5))
    assert torch.equal(weights(module), weights(reference))


def test_rewinding_leaves_out_the_steps_since_the_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The spike of step 18 is seen at step 20, and the last checkpoint is that of step 16."""
    batches = numbered([make_batch(seed) for seed in range(24)])
    batches[17]["factor"] = 1e8
    guards = StepGuards(tmp_path / "a", every=5, spike="rewind")
    _, module, _ = train(tmp_path / "a", batches, guards=guards, every=5, save_every=4)
    _, reference, _ = train(tmp_path / "b", [*batches[:16], *batches[20:]])
    assert torch.equal(weights(module), weights(reference))
    printed = capsys.readouterr().err
    assert "step 16" in printed and "17 to 20" in printed
    resumed = StepGuards(tmp_path / "a", every=5, spike="rewind")
    (tmp_path / "a/checkpoints/step-000000024.ckpt").unlink()
    _, again, _ = train(tmp_path / "a", batches, guards=resumed, every=5, begin=20, save_every=4)
    assert torch.equal(weights(again), weights(module))


def test_rewinding_takes_the_average_back(tmp_path: Path) -> None:
    """In the reference, step 17 is skipped: the average takes in the weights of step 16 once more."""
    batches = numbered([make_batch(seed) for seed in range(24)])
    skipped = {**make_bad_batch(16, "target"), "sample": batches[16]["sample"]}
    reference = EMA(0.5)
    train(tmp_path / "b", [*batches[:16], skipped, *batches[20:]], added=(reference,))
    batches[17]["factor"] = 1e8
    guards, ema = StepGuards(tmp_path / "a", every=5, spike="rewind"), EMA(0.5)
    train(tmp_path / "a", batches, guards=guards, every=5, save_every=4, added=(ema,))
    assert {name: tensor.tolist() for name, tensor in ema.weights.items()} == {
        name: tensor.tolist() for name, tensor in reference.weights.items()
    }
    assert ema.updates == reference.updates


def test_rewinding_refuses_an_average_of_lightning(tmp_path: Path) -> None:
    """Its checkpoints hold the average in the place of the weights."""
    guards = StepGuards(tmp_path, every=5, spike="rewind")
    batches = numbered([make_batch(0)])
    with (
        pytest.warns(UserWarning, match="WeightAveraging"),
        pytest.raises(UserError, match="Lightning's weight averaging"),
    ):
        train(tmp_path, batches, guards=guards, added=(EMAWeightAveraging(),))


def test_a_spike_that_returns_after_each_rewind_stops_the_run(tmp_path: Path) -> None:
    batches = numbered([make_batch(seed) for seed in range(40)])
    for i in (21, 26, 31):
        batches[i]["factor"] = 1e8
    guards = StepGuards(tmp_path, every=5, spike="rewind")
    with pytest.raises(UserError, match=r"step 35\b.* 2 returns to step 20"):
        train(tmp_path, batches, guards=guards, every=5, save_every=20)


def test_a_spike_before_many_steps_is_reported_and_noise_is_not(tmp_path: Path) -> None:
    window, generator = LossWindow(), torch.Generator().manual_seed(0)
    noise = (0.5 * torch.randn(2000, generator=generator)).exp().tolist()
    assert sum(window.add(loss) for loss in noise) <= 10
    early = LossWindow()
    assert not early.add(1.0) and not early.add(2.0) and early.add(1e8)
    assert not early.add(1.5)


def test_spikes_in_a_row_do_not_become_usual_before_they_have_settled() -> None:
    window = LossWindow(settled=50)
    for loss in [1.0, 1.1] * 10:
        assert not window.add(loss)
    assert all(window.add(100.0) for _ in range(49)) and window.usual() == pytest.approx(1.05)


def test_a_new_level_of_the_loss_is_accepted_after_a_while() -> None:
    window = LossWindow(settled=5)
    for _ in range(20):
        assert not window.add(1.0)
    assert [window.add(1e8) for _ in range(8)] == [True] * 5 + [False] * 3
    copy = LossWindow(settled=5)
    copy.load_state_dict(window.state_dict())
    assert copy.limit() == window.limit() and copy.usual() == 1e8


class Reads(TorchDispatchMode):
    """Counts reads of tensors by the host, which wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class CountReads(StepCallback):
    """Notes how many reads there were up to each step."""

    def __init__(self, reads: Reads) -> None:
        self.reads, self.at = reads, {0: 0}

    def on_step(self, trainer: Any, module: Any, step: int) -> None:
        self.at[step] = self.reads.count


def test_only_log_lines_read_from_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads()
    for name in ("tolist", "cpu", "numpy"):
        method = getattr(torch.Tensor, name)

        def counted(tensor: Any, *arguments: Any, method: Any = method) -> Any:
            reads.count += 1
            return method(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    batches = numbered([make_batch(seed) for seed in range(15)])
    batches[8]["target"][0, 0, 0] = torch.nan  # skipped without a word until the log line
    count = CountReads(reads)
    added = (
        PredictionScale(every=5),
        Headroom(tmp_path / "checkpoints", CheckpointSchedule(100, 10, 2)),
        count,
    )
    guards = FusedOnCPU(tmp_path, every=5, spike="skip")
    with reads:
        train(tmp_path, batches, guards=guards, every=5, added=added, save_every=100)
    steps = [step for step in range(2, 16) if count.at[step] > count.at[step - 1]]
    assert steps == [5, 10, 15]


def test_all_stages_skip_through_the_same_hooks() -> None:
    for stage in (Teacher, Student, Metric, Pretrain, Segmentation):
        assert stage.training_step is DepthModule.training_step
        assert stage.configure_gradient_clipping is DepthModule.configure_gradient_clipping


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_step_is_skipped_on_a_gpu(tmp_path: Path, precision: str) -> None:
    batches = numbered([make_batch(seed) for seed in range(BATCHES)])
    batches[3]["target"][0, 0, 0] = torch.nan
    good = [*batches[:3], *batches[4:]]
    runs = []
    for name, given in (("a", batches), ("b", good)):
        trainer, module, guards = train(tmp_path / name, given, precision=precision, accelerator="cuda")
        runs.append((weights(module).cpu(), guards.skipped, module.step_guard.on_device))
    if precision != "16-mixed":  # the scale of the loss differs after a skipped step
        torch.testing.assert_close(runs[0][0], runs[1][0])
    assert runs[0][0].isfinite().all() and runs[0][1] >= 1
    assert runs[0][2] == (precision != "16-mixed")
