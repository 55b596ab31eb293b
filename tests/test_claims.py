"""`make claims`: the rule of the verdict, the plan of the runs, what judges them, and a whole claim in a few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made_configs import make_config

from depth_anything.data.sample import Frame
from depth_anything.training.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment" / "claims").glob("*.yaml"))
sys.path.insert(0, str(ROOT))
from benchmarks.claims import __main__ as command  # noqa: E402
from benchmarks.claims import figures, images, jobs, plan, report, verdict  # noqa: E402


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    path.write_bytes(b"")
    return path


# --- the verdict --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("better", "worse", "word"),
    [
        ([0.30, 0.31, 0.29], [0.34, 0.33, 0.35], verdict.HOLDS),
        ([0.34, 0.33, 0.35], [0.30, 0.31, 0.29], verdict.FAILS),
        (
            [0.30, 0.31, 0.29],
            [0.301, 0.312, 0.291],
            verdict.NOISE,
        ),  # all positive, but smaller than the noise
        (
            [0.20, 0.20, 0.33],
            [0.32, 0.31, 0.32],
            verdict.NOISE,
        ),  # larger than the noise, but one seed disagrees
        ([0.30], [0.90], verdict.NOISE),  # a single seed
        ([0.30, 0.30], [0.30, 0.30], verdict.NOISE),
        ([0.30, 0.30], [0.31, 0.31], verdict.HOLDS),  # no noise at all
    ],
)
def test_the_verdict_follows_from_the_differences_of_the_seeds(
    better: list[float], worse: list[float], word: str
) -> None:
    assert verdict.compare(better, worse, higher_is_better=False).word == word
    negated = ([-b for b in better], [-w for w in worse])
    assert verdict.compare(*negated, higher_is_better=True).word == word


def test_margin_and_noise_are_those_of_numpy() -> None:
    better, worse = [0.30, 0.33, 0.28], [0.35, 0.34, 0.36]
    found = verdict.compare(better, worse, higher_is_better=False)
    assert found.margin == pytest.approx(np.mean(np.subtract(worse, better)))
    assert found.noise == pytest.approx(max(np.std(better, ddof=1), np.std(worse, ddof=1)))
    assert found.differences == pytest.approx([0.05, 0.01, 0.08])


@pytest.mark.parametrize("wrong", [([], []), ([1.0], [1.0, 2.0])])
def test_seeds_that_do_not_match_are_refused(wrong: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="seeds"):
        verdict.compare(*wrong, higher_is_better=True)


@pytest.mark.parametrize(
    ("words", "whole"),
    [
        ([verdict.HOLDS, verdict.HOLDS], verdict.HOLDS),
        ([verdict.HOLDS, verdict.NOISE], verdict.NOISE),
        ([verdict.HOLDS, verdict.NOISE, verdict.FAILS], verdict.FAILS),
        ([], "not measured"),
    ],
)
def test_a_claim_holds_if_all_its_comparisons_hold(words: list[str], whole: str) -> None:
    assert verdict.combine(words) == whole


# --- the plan -----------------------------------------------------------------------------------------------------


def options(*typed: str) -> Any:
    return command.parse(list(typed))


def test_every_claim_shows_and_compares_runs_that_exist() -> None:
    sizes = ("vitn", "vitt")
    runs, claims = plan.list_runs(sizes, None), plan.list_claims(sizes)
    assert [claim.key for claim in claims] == list("abcdefgh")
    for claim in claims:
        arms = [run for _, run in claim.arms if run != "mean-map"]
        assert set(arms) <= set(runs) and claim.comparisons and claim.paper and claim.limits
        for comparison in claim.comparisons:
            assert {comparison.better, comparison.worse} <= set(arms)
            assert set(dict(comparison.tests)) == set(plan.WORLDS)
    assert {run.experiment for run in runs.values()} == set(EXPERIMENTS)
    ordered = [run.name for run in plan.runs_of(claims, runs)]
    assert sorted(ordered) == sorted(runs)
    for name in ordered:
        assert all(ordered.index(need) < ordered.index(name) for need in runs[name].needs)


def resolve(name: str, world: str, encoder_file: Path) -> RunConfig:
    """Resolve the command of a run, without `init`, whose file is read when training starts."""
    typed = options("--output", "out", "--data", "sets", "--seeds", "1")
    run = plan.list_runs(typed.sizes, encoder_file)[name]
    words = command.train_command(run, 1, world, typed)
    config = make_config(*(word for word in words if not word.startswith("init=")))
    folder = Path("out/seed-1", *(["real"] if world == plan.REAL else []))
    assert Path(config.run_dir) == folder / name
    assert (config.stage, config.encoder, config.seed, config.size) == (run.stage, run.encoder, 1, "tiny")
    if run.stage == "pseudolabel":
        assert Path(config.teacher) == Path("out/seed-1", run.needs[0], "model.safetensors")
    if run.photographs:
        expected = {"photographs": "sets/real/photographs"}
        if world == plan.EMBEDDED:
            expected = {"scenes-photographic": "sets/scenes-photographic"}
        assert config.data.sets == expected
        labels = "small-labels" if run.experiment == "small-teacher" else "labels"
        assert config.data.labels == f"{folder}/{labels}"
    return config


def test_runs_are_valid_commands_that_differ_as_they_say(encoder_file: Path) -> None:
    names = (
        "noisy-labels-vitn",
        "keep-all-pixels-vitn",
        "gradient-weight-0.5-vitn",
        "mixed-vitn",
        "registers",
    )
    configs = {name: resolve(name, plan.EMBEDDED, encoder_file) for name in names}
    noisy, unsure, weight, mixed, registers = configs.values()
    assert noisy.data.labels is None and noisy.data.sets == {"scenes-synthetic": "sets/scenes-degraded"}
    assert noisy.sources.scenes["degraded"].degraded is True
    assert unsure.data.sets == noisy.data.sets
    recipes = [config.recipe for config in configs.values() if config.recipe is not None]
    assert [recipe.trim for recipe in recipes] == [0.1, 0, 0.1, 0.1, 0.1]
    assert [recipe.gm_weight for recipe in recipes] == [2, 2, 0.5, 2, 2]
    assert weight.data.labels is None and weight.data.sets == {"scenes-synthetic": "sets/scenes-synthetic"}
    assert (mixed.mix, registers.mix, registers.encoder) == (True, None, "vitn_reg4")
    for key in ("steps", "encoder_lr", "head_lr", "schedule", "warmup", "ssi_weight", "clip_norm"):
        assert len({getattr(recipe, key) for recipe in recipes}) == 1, (
            key
        )  # all students have the same recipe


@pytest.mark.parametrize("name", ["small-labeling", "baseline-vitt"])
def test_runs_on_real_photographs_are_valid_commands(name: str, encoder_file: Path) -> None:
    resolve(name, plan.REAL, encoder_file)


def test_alignment_starts_from_the_file_or_from_an_encoder_of_all_seeds(encoder_file: Path) -> None:
    runs = plan.list_runs(("vitn",), encoder_file)
    typed = command.train_command(runs["alignment-vitn"], 1, plan.EMBEDDED, options())
    assert (
        f"init='{encoder_file}'" in typed
        and "recipe.alignment_weight=1.0" in typed
        and "pretrain" not in runs
    )
    runs = plan.list_runs(("vitn",), None)
    for world, folder in ((plan.EMBEDDED, "all-seeds"), (plan.REAL, "all-seeds/real")):
        typed = command.train_command(runs["no-alignment-vitn"], 1, world, options("--output", "out"))
        assert (
            f"init=out/{folder}/pretrain/model.safetensors" in typed
            and "recipe.alignment_weight=0.0" in typed
        )
    config = make_config(*command.train_command(runs["pretrain"], 1, plan.REAL, options("--output", "out")))
    assert (config.run_dir, config.steps, config.seed) == (
        "out/all-seeds/real/pretrain",
        plan.PRETRAIN_STEPS,
        0,
    )
    assert list(config.data.sets) == ["photographs"]


def test_experiments_need_no_stage_and_make_the_steps_of_the_estimate() -> None:
    student = make_config("experiment=claims/small-teacher")
    teacher = make_config("experiment=claims/small-teacher", "stage=teacher")
    labeling = make_config("experiment=claims/small-teacher", "stage=pseudolabel")
    assert (student.stage, student.steps) == ("student", plan.STUDENT_STEPS)
    assert (teacher.encoder, teacher.steps) == ("vitn", plan.TEACHER_STEPS)
    assert Path(teacher.run_dir).parent == Path("outputs/claims/seed-0")
    assert Path(labeling.teacher) == Path(teacher.run_dir) / "model.safetensors"
    assert labeling.labels == student.labels and labeling.encoder == teacher.encoder


def test_photographs_are_as_scenes_but_for_the_images() -> None:
    theirs, ours = (
        make_config("stage=teacher", f"sources={name}").sources for name in ("scenes", "photographs")
    )
    assert (ours.labelled, ours.validation) == (theirs.labelled, theirs.validation)
    used = {"synthetic", "validation"}  # the others are of stage=segmentation, or replaced by photographs
    assert ours.scenes == {name: scene for name, scene in theirs.scenes.items() if name in used}


def test_shared_runs_are_listed_once_and_finished_ones_not_at_all(tmp_path: Path) -> None:
    typed = options(
        "--only", "c", "f", "--seeds", "0", "1", "--output", str(tmp_path), "--data", str(tmp_path)
    )
    runs, claims = plan.list_runs(typed.sizes, None), plan.list_claims(typed.sizes)
    chosen = [claim for claim in claims if claim.key in typed.only]
    names = [job.name for job in command.list_jobs(typed, chosen, runs)]
    assert len(names) == len(set(names)) and names.count("seed-0/baseline-vitn") == 1
    assert "degraded-scenes" not in names and "seed-0/registers" not in names
    folder = tmp_path / "seed-0" / "teacher"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "finished.json").write_text(json.dumps({"steps": plan.TEACHER_STEPS}))
    assert names != (left := [job.name for job in command.list_jobs(typed, chosen, runs)])
    assert set(names) - set(left) == {"seed-0/teacher"}


def test_an_output_of_other_settings_is_refused(tmp_path: Path) -> None:
    assert command.main(["--real", str(tmp_path), "--output", str(tmp_path / "out")]) == 2  # no photos
    command.check(options("--output", str(tmp_path / "out"), "--student-steps", "5"))
    assert command.main(["--output", str(tmp_path / "out"), "--student-steps", "6"]) == 2


# --- the images that judge ----------------------------------------------------------------------------------------


def test_sets_to_tune_on_do_not_judge(tmp_path: Path) -> None:
    for name in ("KITTI", "NYU_A", "NYU_B", "OTHER"):
        (tmp_path / "rgbd" / name).mkdir(parents=True)
        (tmp_path / "rgbd" / name / "set.yaml").write_text("images: images\n")
    assert images.judged_sets(tmp_path) == ["KITTI", "NYU_A", "NYU_B", "OTHER"]
    (tmp_path / "README.txt").write_text("== how to use ==\nTune on: OTHER, NYU_*. Judge on all others.\n")
    assert images.judged_sets(tmp_path) == ["KITTI"]


def test_disparity_becomes_depth_up_to_a_scale() -> None:
    disparity = np.array([[8.0, 4.0, 2.0, 0.0, np.nan]], np.float32)
    depth = images.with_depth(Frame("a", np.zeros((1, 5, 3), np.uint8), disparity=disparity)).depth
    np.testing.assert_allclose(depth, [[1.0, 2.0, 4.0, np.nan, np.nan]])


def test_sharp_frames_are_judged_at_the_size_of_the_scenes() -> None:
    depth = np.arange(448 * 224, dtype=np.float32).reshape(448, 224)
    image = np.full((448, 224, 3), 7, np.uint8)
    small = images.shrink(Frame("a", image, depth=depth))
    assert small.image.shape == (224, 112, 3) and (small.image == 7).all()
    np.testing.assert_array_equal(small.depth, depth[1::2, 1::2])
    tiny = Frame("a", image[:20], depth=depth[:20])
    assert images.shrink(tiny) is tiny


# --- the report ---------------------------------------------------------------------------------------------------


def write_figures(path: Path, rows: list[tuple[str, str, float, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sets = [
        {
            "test": test,
            "set": name,
            "images": 2,
            "abs_rel": a,
            "d1": 0.5,
            "boundary_f1": f,
            "images_digest": "",
        }
        for test, name, a, f in rows
    ]
    path.write_text(json.dumps({"version": figures.FIGURES_VERSION, "digest": "", "sets": sets}))


def test_the_report_has_the_figures_the_verdicts_and_the_papers_table(tmp_path: Path) -> None:
    typed = options("--only", "f", "--output", str(tmp_path), "--real", "DIR")
    runs = plan.list_runs(("vitn",), None)
    claims = [claim for claim in plan.list_claims(("vitn",)) if claim.key == "f"]
    for seed in range(3):
        for run, error in (("baseline-vitn", 0.29), ("mixed-vitn", 0.30), ("synthetic-only-vitn", 0.32)):
            error += 0.001 * seed
            scenes = [("photographic", "p", error, 0.1), ("synthetic", "s", error, 0.1)]
            real = [("real", "A", 0.2, 0), ("real", "B", 0.4, 0), ("sharp", "M", 0.3, 0.2)]
            rows = scenes + (real if run == "synthetic-only-vitn" else [])
            write_figures(command.figures_file(run, seed, plan.EMBEDDED, tmp_path, runs), rows)
            if runs[run].photographs:
                real[1] = ("real", "B", 0.4 - (0.05 if run == "baseline-vitn" else -0.05), 0)
                write_figures(command.figures_file(run, seed, plan.REAL, tmp_path, runs), real)
    write_figures(command.figures_file("mean-map", 0, plan.EMBEDDED, tmp_path, runs), [("real", "A", 0.5, 0)])
    report.write_results(typed, claims, runs, minutes=1)
    text = (tmp_path / "claims.md").read_text()
    content = json.loads((tmp_path / "claims.json").read_text())
    (claim,) = content["claims"]
    # on real frames the mix is worse than synthetic images only: .2 and .45 against .2 and .4
    assert claim["verdicts"] == {plan.EMBEDDED: verdict.HOLDS, plan.REAL: verdict.FAILS}
    real_values = [row["better_values"][0] for row in claim["comparisons"] if row["world"] == plan.REAL]
    assert real_values == pytest.approx([0.325, 0.275])
    assert "| both | .301 ± .001 |" in text and "| ViT-S trained on | KITTI |" in text
    assert "| A | 2 | **.500** |" not in text and "| A | 2 | .500 |" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120
    assert content["real_sets"]["B"]["baseline-vitn"] == pytest.approx([0.35] * 3)


# --- a whole claim ------------------------------------------------------------------------------------------------


class FinishedProcess:
    """A process of multiprocessing that has ended: with 1 if its kind is "bad"."""

    def __init__(self, target: Any, args: tuple[Any, ...]) -> None:
        self.exitcode, (self.sentinel, end) = int(args[0] == "bad"), os.pipe()
        os.close(end)

    def start(self) -> None:
        pass

    def join(self) -> None:
        os.close(self.sentinel)


def test_jobs_that_need_a_failed_one_are_not_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = [
        jobs.Job("broken", "bad", {}),
        jobs.Job("after", "good", {}, needs=("broken",)),
        jobs.Job("after that", "good", {}, needs=("after",)),
        jobs.Job("one set", "bad", {}, optional=True),
        jobs.Job("judge", "good", {}, needs=("one set", "never listed")),
        jobs.Job("too long", "good", {}, seconds=1e6),
    ]
    scheduler = jobs.Scheduler(work, tmp_path, parallel=2, threads=1, seconds=1e5)
    scheduler.context = SimpleNamespace(Process=FinishedProcess)
    outcome = scheduler.run()
    assert (sorted(outcome.failed), outcome.done) == (["broken", "one set"], ["judge"])
    assert sorted(outcome.left) == ["after", "after that", "too long"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[-1].startswith("[3 of 6] judge: 0 s; ")


@pytest.mark.heavy
def test_a_whole_claim_runs_and_continues(tmp_path: Path) -> None:
    typed = ["--only", "c", "--sizes", "vitn", "--seeds", "0", "--scenes", "8", "--test-scenes", "2"]
    typed += ["--teacher-steps", "1", "--student-steps", "1", "--jobs", "1", "batch_size=2", "image_size=42"]
    call = [sys.executable, "-m", "benchmarks.claims", *typed]
    places = ["--output", str(tmp_path / "a (b)"), "--data", str(tmp_path / "data")]
    done = subprocess.run([*call, *places], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (claim,) = json.loads((tmp_path / "a (b)" / "claims.json").read_text())["claims"]
    shown = {arm["run"]: arm["figures"] for arm in claim["arms"]}
    assert set(shown) == {"mean-map", "teacher", "baseline-vitn", "synthetic-only-vitn"}
    assert all(0 < row["photographic abs_rel"][0] < 10 for row in shown.values())
    assert claim["verdicts"][plan.EMBEDDED] == verdict.NOISE  # a single seed
    assert (tmp_path / "a (b)" / "claim-c-embedded.jpg").stat().st_size > 1000
    weights = tmp_path / "a (b)" / "seed-0" / "baseline-vitn" / "model.safetensors"
    config = (weights.parent / "config.yaml").read_text()
    assert "image_size: 42" in config and "seed-0/labels" in config
    before = weights.stat().st_mtime_ns
    runs, claims = plan.list_runs(["vitn"], None), plan.list_claims(["vitn"])
    again = command.list_jobs(options(*typed, *places), [c for c in claims if c.key == "c"], runs)
    left = [job.name for job in again if job.kind == "train" or job.name.startswith("judge")]
    assert (
        left == ["seed-0/labeling"] and weights.stat().st_mtime_ns == before
    )  # train.py finds its labels complete


def test_modules_need_no_torch_before_a_job_starts() -> None:
    code = "import sys; import benchmarks.claims.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
