"""`make claims`: the rule of the verdict, the plan of the runs, what judges them, and a whole claim in a few steps."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_configs import make_config

from depth_anything.data.sample import Frame

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


def test_every_claim_shows_and_compares_runs_that_exist(encoder_file: Path) -> None:
    sizes = ("vitn", "vitt")
    runs, claims = plan.list_runs(sizes, encoder_file), plan.list_claims(sizes)
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


def planned(world: str, encoder_file: Path) -> list[tuple[plan.Run, list[str]]]:
    typed = options("--output", "out", "--data", "sets", "--seeds", "1")
    runs = plan.list_runs(typed.sizes, encoder_file).values()
    chosen = [run for run in runs if world == plan.EMBEDDED or run.photographs]
    return [(run, command.train_command(run, 1, world, typed)) for run in chosen]


@pytest.mark.parametrize("world", plan.WORLDS)
def test_every_run_is_a_valid_command_that_differs_from_its_counterpart_as_it_says(
    world: str, encoder_file: Path
) -> None:
    configs = {}
    for run, typed in planned(world, encoder_file):
        # `init` is a real encoder file in use; its content is read when training starts
        config = make_config(*(word for word in typed if not word.startswith("init=")))
        folder = Path("out/seed-1", *(["real"] if world == plan.REAL and run.photographs else []))
        assert Path(config.run_dir) == folder / run.name
        assert (config.stage, config.encoder, config.seed, config.size) == (run.stage, run.encoder, 1, "tiny")
        if run.photographs:
            name = "photographs" if world == plan.REAL else "scenes-photographic"
            assert list(config.data.sets)[0] == name
            assert Path(str(config.data.labels)).parent == folder
        elif run.stage == "student":
            assert config.data.labels is None and list(config.data.sets) == ["scenes-synthetic"]
        if run.stage == "pseudolabel":
            assert Path(config.teacher) == Path("out/seed-1", run.needs[0], "model.safetensors")
        configs[run.name] = config
    if world == plan.REAL:
        assert set(configs) == {
            run.name for run, _ in planned(plan.EMBEDDED, encoder_file) if run.photographs
        }
        return
    recipes = {name: config.recipe for name, config in configs.items() if config.recipe is not None}
    assert configs["noisy-labels-vitn"].data.sets == {"scenes-synthetic": "sets/scenes-degraded"}
    assert configs["noisy-labels-vitn"].sources.scenes["degraded"].degraded is True
    assert (recipes["noisy-labels-vitn"].trim, recipes["keep-all-pixels-vitn"].trim) == (0.1, 0)
    assert (recipes["baseline-vitn"].trim, recipes["baseline-all-pixels-vitn"].trim) == (0.1, 0)
    weights = [recipes[f"gradient-weight-{weight}-vitn"].gm_weight for weight in (0.5, 1.0, 4.0)]
    assert (*weights, recipes["synthetic-only-vitn"].gm_weight) == (0.5, 1, 4, 2)
    assert (configs["mixed-vitn"].mix, configs["baseline-vitn"].mix) == (True, None)
    assert configs["small-labeling"].data.labels == configs["small-teacher-student-vitn"].data.labels
    assert configs["small-labeling"].data.labels != configs["labeling"].data.labels
    assert configs["registers"].encoder == "vitn_reg4"
    same = ("steps", "encoder_lr", "head_lr", "schedule", "warmup", "ssi_weight", "clip_norm")
    for key in same:  # all students have the same recipe
        values = {getattr(recipes[name], key) for name, c in configs.items() if c.stage == "student"}
        assert len(values) == 1, key


def test_alignment_is_on_with_an_encoder_and_left_out_without_one(encoder_file: Path) -> None:
    runs = plan.list_runs(("vitn",), encoder_file)
    typed = command.train_command(runs["alignment-vitn"], 0, plan.EMBEDDED, options())
    assert f"init={encoder_file}" in typed and "recipe.alignment_weight=1.0" in typed
    assert "alignment-vitn" not in plan.list_runs(("vitn",), None)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_a_command_of_its_own(experiment: str) -> None:
    """The steps are those of the estimate; the stage need not be typed."""
    typed = ["recipe.alignment_weight=0"] if experiment == "alignment" else []
    config = make_config(f"experiment=claims/{experiment}", *typed)
    assert config.stage == "student" and config.steps == plan.STUDENT_STEPS
    assert Path(config.run_dir).parent == Path("outputs/claims/seed-0")
    if experiment in ("baseline", "small-teacher"):
        teacher = make_config(f"experiment=claims/{experiment}", "stage=teacher")
        labeling = make_config(f"experiment=claims/{experiment}", "stage=pseudolabel")
        assert teacher.steps == plan.TEACHER_STEPS
        assert Path(labeling.teacher) == Path(teacher.run_dir) / "model.safetensors"
        assert labeling.labels == config.labels and labeling.encoder == teacher.encoder


def test_photographs_are_as_scenes_but_for_the_images() -> None:
    theirs, ours = (
        make_config("stage=teacher", f"sources={name}").sources for name in ("scenes", "photographs")
    )
    assert (ours.labelled, ours.validation) == (theirs.labelled, theirs.validation)
    assert ours.scenes == {name: scene for name, scene in theirs.scenes.items() if name != "photographic"}


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


def test_jobs_that_need_a_failed_one_are_not_started(tmp_path: Path) -> None:
    missing = {"typed": ["images", str(tmp_path / "none"), str(tmp_path / "out")]}
    work = [
        jobs.Job("bad", "shard", missing),
        jobs.Job("after", "shard", missing, needs=("bad",)),
        jobs.Job("late", "shard", missing, seconds=1e6),
    ]
    scheduler = jobs.Scheduler(work, tmp_path / "logs", parallel=1, threads=1, seconds=1e5)
    outcome = scheduler.run()
    assert (outcome.failed, sorted(outcome.left), outcome.done) == (["bad"], ["after", "late"], [])
    assert "none" in scheduler.log("bad").read_text()


def test_a_whole_claim_runs_and_continues(tmp_path: Path) -> None:
    typed = ["--only", "c", "--sizes", "vitn", "--seeds", "0", "--scenes", "8", "--test-scenes", "2"]
    typed += ["--teacher-steps", "1", "--student-steps", "1", "--jobs", "1", "batch_size=2", "image_size=42"]
    call = [sys.executable, "-m", "benchmarks.claims", *typed]
    places = ["--output", str(tmp_path / "out"), "--data", str(tmp_path / "data")]
    done = subprocess.run([*call, *places], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (claim,) = json.loads((tmp_path / "out" / "claims.json").read_text())["claims"]
    shown = {arm["run"]: arm["figures"] for arm in claim["arms"]}
    assert set(shown) == {"mean-map", "teacher", "baseline-vitn", "synthetic-only-vitn"}
    assert all(0 < row["photographic abs_rel"][0] < 10 for row in shown.values())
    assert claim["verdicts"][plan.EMBEDDED] == verdict.NOISE  # a single seed
    assert (tmp_path / "out" / "claim-c-embedded.jpg").stat().st_size > 1000
    weights = tmp_path / "out" / "seed-0" / "baseline-vitn" / "model.safetensors"
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
