"""Plans against hand computations: FLOP from published counts, hours, bytes, cores, checkpoints and money."""

import importlib.util
import io
import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from shard_builders import make

from depth_anything.cli import main
from depth_anything.devices import find_device
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.planning import assumptions
from depth_anything.planning.assumptions import Cluster
from depth_anything.planning.goodput import Checkpoints, Interruptions, expected_goodput, job_mtbf_s
from depth_anything.planning.pipeline import PipelinePlan, split_stages
from depth_anything.planning.report import format_plan
from depth_anything.planning.stage_plan import NetworkCost, StagePlan, count_network, plan_stage
from depth_anything.training.command import compose_config
from depth_anything.training.config import RunConfig

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
H100 = find_device("h100")
PEAK = 989e12
# GFLOP of the official networks at 518×518 and of ViT-G at 518×686, counted with other code (users of the authors').
STEP = {"vits": 345.2e9, "vitb": 1140.9e9, "vitl": 3911.0e9, "vitg": 13598.1e9}
ENCODER = {"vits": 93.4e9}
LABEL_VITG = 6200.8e9
PHOTOGRAPHS = 62_300_000


@cache
def counted(*typed: str) -> tuple[RunConfig, NetworkCost]:
    config = compose_config(typed, CONFIGS)
    return config, count_network(config)


def planned(*typed: str, **changes: float | None) -> StagePlan:
    cluster = replace(Cluster(H100, gpus=64, mfu=0.4), **changes)  # type: ignore[arg-type]
    return plan_stage(*counted(*typed), cluster, {})


def test_the_papers_teacher_by_hand() -> None:
    stage = planned("stage=teacher", "size=paper")
    assert (stage.work.gpus, stage.work.images_per_gpu, stage.work.steps) == (64, 1, 160_000)
    assert stage.work.samples == 10_240_000
    assert stage.data.records == 604_000 and stage.data.passes == pytest.approx(10_240 / 604)
    assert stage.work.flop_per_sample == pytest.approx(STEP["vitg"], rel=0.02)
    hours = 10_240_000 * STEP["vitg"] / (64 * PEAK * 0.4) / 3600
    assert stage.useful_hours == pytest.approx(hours, rel=0.02)
    assert stage.gpu_hours == pytest.approx(64 * hours / stage.goodput, rel=0.02)
    assert stage.data.read_bytes == 10_240_000 * (98_000 + 648_000)
    assert (
        stage.data.requests_per_s
        == stage.work.images_per_s
        == pytest.approx(10_240_000 / hours / 3600, rel=0.02)
    )


def test_the_papers_teacher_recomputes_its_blocks() -> None:
    stage = planned("stage=teacher", "size=paper")
    assert stage.work.recomputed_per_sample == pytest.approx(3566.7e9, rel=0.02)
    assert stage.work.flop == 10_240_000 * (stage.work.flop_per_sample + stage.work.recomputed_per_sample)
    assumed = planned("stage=teacher", "size=paper", mfu=None)
    executed = stage.work.flop_per_sample + stage.work.recomputed_per_sample
    assert assumed.work.mfu == pytest.approx(0.4 * stage.work.flop_per_sample / executed)


def test_the_papers_student_by_hand() -> None:
    stage = planned("stage=student", "size=paper", "encoder=vits", mfu=0.25)
    step = STEP["vits"] + ENCODER["vits"]  # feature alignment runs a frozen encoder
    assert stage.work.flop_per_sample == pytest.approx(step, rel=0.02)
    assert stage.work.recomputed_per_sample == 0
    assert (stage.work.gpus, stage.work.images_per_gpu) == (64, 3)
    rate = 64 * PEAK * 0.25 / step
    assert stage.work.images_per_s == pytest.approx(rate, rel=0.02)
    assert stage.data.passes == pytest.approx(192 * 480_000 / PHOTOGRAPHS)
    assert stage.data.cores == pytest.approx(rate * 2.98e-3, rel=0.02)
    assert stage.data.requests_per_s == 2 * stage.work.images_per_s
    assert stage.data.read_bytes_per_s == pytest.approx(rate * 237_000, rel=0.02)
    assert stage.data.label_bytes == 0


def test_the_papers_labels_by_hand() -> None:
    stage = planned("stage=pseudolabel", "size=paper")
    assert stage.work.flop_per_sample == pytest.approx(LABEL_VITG, rel=0.02)
    assert (stage.data.records, stage.data.shards) == (PHOTOGRAPHS, 62_300)
    assert stage.data.label_bytes == PHOTOGRAPHS * 139_000
    assert stage.data.read_bytes == PHOTOGRAPHS * 98_000
    shard = 1000 * LABEL_VITG / (PEAK * 0.4)
    assert stage.useful_hours == pytest.approx(math.ceil(62_300 / 64) * shard / 3600, rel=0.02)
    assert stage.work.images_per_s == pytest.approx(64 * 1000 / shard, rel=0.02)
    idle = math.ceil(62_300 / 64) / (62_300 / 64)  # some GPUs get one shard less
    assert stage.useful_hours * 3600 * stage.work.images_per_s == pytest.approx(PHOTOGRAPHS * idle)
    assert stage.data.write_bytes_per_s == pytest.approx(64 * 139_000 * 1000 / shard, rel=0.02)
    assert stage.data.cores == pytest.approx(stage.work.images_per_s * (2.98e-3 + 3.7e-3))
    assert stage.checkpoints is None


def test_crops_that_the_teacher_labels_are_counted() -> None:
    plain = planned("stage=pseudolabel", "size=paper", "encoder=vits")
    crops = planned("stage=pseudolabel", "size=paper", "encoder=vits", "label_crops=2")
    assert crops.work.flop_per_sample - plain.work.flop_per_sample == pytest.approx(2 * 115.3e9, rel=0.02)
    assert crops.data.label_bytes / plain.data.label_bytes == pytest.approx(1 + 2 * 518 / 686)


@pytest.mark.parametrize(
    ("stage", "gpus", "used"),
    [("teacher", 512, 64), ("student", 512, 192), ("student", 100, 96), ("teacher", 3, 2)],
)
def test_a_stage_uses_as_many_gpus_as_divide_its_batch(stage: str, gpus: int, used: int) -> None:
    plan = planned(f"stage={stage}", "size=paper", "encoder=vits", gpus=gpus)
    assert plan.work.gpus == used
    assert plan.work.images_per_gpu == {"teacher": 64, "student": 192}[stage] // used


def test_keys_of_train_py_change_the_plan() -> None:
    typed = ("stage=student", "size=paper", "encoder=vits")
    stage = planned(*typed, "steps=1000", "batch_size=64", "recipe.alignment_weight=0")
    assert stage.work.samples == 64_000
    assert stage.work.flop_per_sample == pytest.approx(STEP["vits"], rel=0.02)
    assert planned(*typed, "recipe.checkpointing=true").work.recomputed_per_sample > 50e9
    assert planned(*typed, "image_size=266").work.flop_per_sample < 0.3 * stage.work.flop_per_sample


def test_money_cores_and_restarts_follow_what_is_typed() -> None:
    stage = planned(
        "stage=student", "size=paper", "encoder=vits", price_per_gpu_hour=2.5, images_per_core=100.0
    )
    assert stage.cost == pytest.approx(2.5 * stage.gpu_hours)
    assert stage.data.cores == pytest.approx(stage.work.images_per_s / 100)
    assert planned("stage=student", "size=paper", "encoder=vits").cost is None


def test_goodput_is_that_of_the_closed_form_where_no_time_limit_matters() -> None:
    stage = planned("stage=teacher", "size=paper", time_limit_s=1e12)
    assert stage.checkpoints is not None
    stops = Interruptions(job_mtbf_s(64), 600.0)
    exact = expected_goodput(stops, Checkpoints(stage.checkpoints.every_s, stage.checkpoints.stop_s))
    assert 1 - stage.goodput == pytest.approx(1 - exact, rel=0.03)


def test_checkpoints_by_hand() -> None:
    checkpoints = planned("stage=teacher", "size=paper").checkpoints
    assert checkpoints is not None
    total, unused = (
        1_258_132_225,
        2_656_512,
    )  # parameters of the official ViT-G, and those that are never trained
    assert checkpoints.bytes == 4 * total + 8 * (total - unused)
    assert checkpoints.write_s == checkpoints.read_s == checkpoints.bytes / 1e9
    assert checkpoints.stop_s == 2 * checkpoints.write_s and checkpoints.behind_s == 0
    assert (checkpoints.count, checkpoints.kept, checkpoints.kept_bytes) == (80, 2, 3 * checkpoints.bytes)
    assert checkpoints.best_every_s == pytest.approx(
        math.sqrt(2 * checkpoints.stop_s * 50_677 * 3600 / 64), rel=0.01
    )
    read = planned("stage=teacher", "size=paper", read_bytes_per_s=4e9).checkpoints
    assert read is not None and read.stop_s == pytest.approx(1.25 * checkpoints.write_s)


def test_asynchronous_checkpoints_by_hand() -> None:
    """A copy to the host stops the run; the file is complete later, and the next one waits for it."""
    typed = ("stage=teacher", "size=paper", "checkpoint.asynchronous=true")
    plain, rare = planned(*typed[:2]), planned(*typed)
    assert plain.checkpoints is not None and rare.checkpoints is not None
    size, cycle = rare.checkpoints.bytes, rare.checkpoints.every_s
    assert rare.checkpoints.behind_s == plain.checkpoints.stop_s < cycle
    assert rare.checkpoints.stop_s == size / 20e9 and rare.goodput > plain.goodput
    often = planned(*typed, "checkpoint.every=200").checkpoints
    assert often is not None and often.every_s < often.behind_s
    assert often.stop_s == pytest.approx(size / 20e9 + often.behind_s - often.every_s)
    assert often.best_every_s >= often.behind_s
    day = planned(*typed, time_limit_s=1e12)
    exact = expected_goodput(
        Interruptions(job_mtbf_s(64), 600.0),
        Checkpoints(cycle, rare.checkpoints.stop_s, rare.checkpoints.behind_s),
    )
    assert 1 - day.goodput == pytest.approx(1 - exact, rel=0.05)


def test_checkpoints_that_are_kept_for_good_take_disk() -> None:
    checkpoints = planned("stage=teacher", "size=paper", "checkpoint.keep_every=20000").checkpoints
    assert checkpoints is not None
    assert (checkpoints.count, checkpoints.kept) == (
        80,
        9,
    )  # 8 of 20,000 steps, the last of them, and 158,000
    assert checkpoints.kept_bytes == 10 * checkpoints.bytes


def test_a_checkpoint_has_the_size_of_weights_and_moments() -> None:
    stage = planned("stage=teacher", "size=paper", "encoder=vitn", "image_size=98")
    model = DepthAnything("vitn")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.zeros(1, 3, 14, 14)).sum().backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    assert stage.checkpoints is not None
    assert file.tell() == pytest.approx(stage.checkpoints.bytes, rel=0.03)


def test_gradients_that_are_slower_than_arithmetic_set_the_step() -> None:
    fast = planned("stage=teacher", "size=paper")
    slow = planned("stage=teacher", "size=paper", node_network_bytes_per_s=1e9)
    trained = 1_258_132_225 - 2_656_512
    gradients = 2 * 4 * trained * 7 / 8  # eight nodes
    assert fast.work.gradient_bytes_per_s == pytest.approx(gradients / fast.work.step_s)
    assert (fast.work.network_bound, slow.work.network_bound) == (False, True)
    assert slow.work.step_s == pytest.approx(gradients / 1e9)
    assert slow.hours == pytest.approx(160_000 * slow.work.step_s / 3600 / slow.goodput)
    assert planned("stage=teacher", "size=paper", gpus=8).work.gradient_bytes_per_s == 0


def test_constants_are_those_that_were_measured() -> None:
    results = ROOT / "benchmarks" / "results"
    loader = json.loads((results / "data_epyc2_202611.json").read_text())["results"]["workers"]["2"]
    assert round(loader["cpu_ms"]["ours, pre-resized"]["median"], 2) == assumptions.LOADER_MS
    page = (results / "codec_epyc2_202611.md").read_text().split("### hypersim_518x686")[1].split("###")[0]
    rows = {row[0].strip("| "): row for row in (line.split(" | ") for line in page.splitlines())}
    assert float(rows["codec.py q12"][1]) * 1000 == assumptions.LABEL_BYTES
    assert float(rows["codec.py q12"][3]) == assumptions.ENCODE_LABEL_MS
    assert float(rows["codec.py f32"][1]) * 1000 == assumptions.DEPTH_BYTES
    synthetic, photographs = (
        sum(list(assumptions.PAPER_RECORDS.values())[part]) for part in (slice(5), slice(5, None))
    )
    assert (synthetic, photographs) == (604_000, PHOTOGRAPHS)


def test_a_set_that_exists_has_priority_over_the_paper(tmp_path: Path) -> None:
    make(tmp_path / "own", shards=2, name="own")
    manifest = json.loads((tmp_path / "own" / "manifest.json").read_text())
    size = sum(shard["bytes"] for shard in manifest["shards"])
    typed = (f"photos={tmp_path / 'own'}", "sources=own", "encoder=vitn", "recipe.alignment_weight=0")
    stage = planned("stage=student", "size=paper", "steps=3", *typed, gpus=2)
    assert (stage.data.records, stage.data.shards, stage.data.passes) == (10, 2, 3 * 192 / 10)
    assert stage.data.read_bytes == pytest.approx(3 * 192 * (size / 10 + 139_000))


def test_a_set_of_unknown_size_is_refused_unless_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["stage=student", "size=paper", "sources=own", "photos=none/own"]
    assert main(["plan", *typed]) == 2
    assert "--records own=NUMBER" in capsys.readouterr().err
    assert main(["plan", *typed, "--records", "own=20000", "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert (stage["data"]["records"], stage["data"]["shards"]) == (20_000, 20)


def test_the_pipeline_has_a_teacher_labels_and_students() -> None:
    def stages(*typed: str) -> list[str]:
        return [" ".join(sorted(one)) for one in split_stages(typed)]

    students = [f"encoder={encoder} size=paper stage=student" for encoder in ("vits", "vitb", "vitl")]
    assert stages("size=paper") == ["size=paper stage=teacher", "size=paper stage=pseudolabel", *students]
    assert stages("size=paper", "encoder=[vitb]")[2:] == students[1:2]
    assert stages("size=tiny")[2:] == ["size=tiny stage=student"]
    assert stages("stage=student", "encoder=vits") == ["encoder=vits stage=student"]
    perturbed = stages("size=tiny", "recipe.warmup=0", "label_crops=1", "+sources.images.a=b")
    assert ["recipe" in one for one in perturbed] == [True, False, True]
    assert ["label_crops" in one for one in perturbed] == [False, True, False]
    assert all("+sources.images.a=b" in one for one in perturbed)


def test_the_command_prints_a_table_of_all_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["plan", "size=tiny", "steps=8", "--gpus", "2", "--device", "a100", "--price-per-gpu-hour", "3"])
        == 0
    )
    table = capsys.readouterr().out
    assert re.search(r"teacher +pseudolabel +student +all\n +vitt +vitt +vitn\n", table)
    rows = ("GPU-hours", "CPU cores", "label shards written", "checkpoint", "cost", "goodput")
    for row in (*rows, "  read back in", "  kept", "  disk, with a new one", "  written in all"):
        assert re.search(rf"(?m)^{row} ", table), row
    assert "2 × A100 (312 TFLOP/s" in table
    assert "assumed     MFU" in table and "assumed     a failure every 50,677 GPU-hours" in table


def test_the_command_prints_the_same_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "stage=student", "size=tiny", "--mfu", "0.1", "--gpus", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (stage,) = plan["stages"]
    work = stage["work"]
    assert (plan["mfu"], work["mfu"], work["gpus"]) == ("typed", 0.1, 4)
    assert work["step_s"] == pytest.approx(8 * work["flop_per_sample"] / (4 * PEAK * 0.1))
    assert stage["gpu_hours"] == pytest.approx(4 * stage["hours"])
    assert plan["all"]["gpu_hours"] == stage["gpu_hours"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["size=paper", "--device", "h10"], "type h100 (known: a100, h100"),
        (["size=paper", "stpes=3"], "steps=3"),
        (["size=huge"], "size=paper"),
        (["stage=pretrain", "size=paper"], "stage=pretrain cannot be planned"),
        (["stage=pseudolabel", "size=paper", "teacher=transformers:x"], "teacher=transformers:x"),
        (["stage=student", "size=paper", "micro_batch=5", "--gpus", "8"], "micro_batch=5"),
        (["size=paper", "--records", "own=few"], "--records own=20000"),
        (["stage=student", "size=paper", "--records", "sa1=5"], "no stage reads a set named sa1"),
        (["stage=student", "size=paper", "encoder=vits,vitb"], "type one, as encoder=vits"),
        (["size=paper", "--mfu", "40"], "--mfu must be"),
        (["stage=student", "--time-limit", "0.01"], "no step would be kept"),
        (["stage=pseudolabel", "--gpu-hours-per-failure", "1e-6"], "--gpu-hours-per-failure"),
    ],
)
def test_mistakes_are_one_sentence(typed: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *typed]) == 2
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == 1 and "Traceback" not in errors


def test_another_gpu_is_planned_by_the_peak_of_its_data_sheet(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "stage=student", "--device", "mi300x", "--peak-tflops", "1307", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["cluster"]["device"], plan["cluster"]["peak_tflops"]) == ("mi300x", 1307.0)
    (stage,) = plan["stages"]
    work = stage["work"]
    assert work["step_s"] == pytest.approx(
        work["samples"] / work["steps"] * work["flop_per_sample"] / (work["gpus"] * 1307e12 * work["mfu"])
    )


def test_a_plan_says_what_limits_it() -> None:
    cluster = Cluster(H100, gpus=512, node_network_bytes_per_s=1e9)
    typed = ("stage=student", "size=paper", "encoder=vits")
    text = format_plan(PipelinePlan(typed, cluster, (plan_stage(*counted(*typed), cluster, {}),)))
    assert "student vits can use 192 of 512 GPUs" in text
    assert "student vits waits for the network" in text
    assert "fewer than 4 images per GPU: student vits" in text


# docs/scale.md

PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("goodput_script", ROOT / "benchmarks" / "goodput.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_that_the_script_simulates(script: ModuleType) -> None:
    assert script.replace_tables(PAGE, script.tables([])) == PAGE, (
        "docs/scale.md is out of date; type  python benchmarks/goodput.py --write"
    )


@pytest.mark.parametrize("gpus", [8, 64, 512])
def test_the_page_has_the_plans_of_this_code(script: ModuleType, gpus: int) -> None:
    cluster = Cluster(H100, gpus=gpus)
    students = ("stage=student", "size=paper", "encoder=vits")
    stages = [
        plan_stage(*counted(*typed), cluster, {}) for typed in (("stage=teacher", "size=paper"), students)
    ]
    plan = PipelinePlan(("size=paper",), cluster, tuple(stages))
    for row in (*script.demand_rows([plan]), *script.interval_rows([plan]), *script.index_rows([plan])):
        assert row[0] == "all" or f"| {' | '.join(row)} |\n" in PAGE
    assert stages[0].checkpoints is not None
    assert stages[0].checkpoints.stop_s == pytest.approx(script.VITG_CHECKPOINT_S, rel=0.01)
