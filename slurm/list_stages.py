"""List the stages of a pipeline for pipeline.sh: what is finished, and the arguments of what is not.

    python slurm/list_stages.py [OVERRIDE …] [-- ARGUMENT OF EVALUATE …]

Prints a line per stage, with tabs between its fields: kind, job name, "finished" or "open", arguments as typed in a
shell. The arguments are those of slurm/train.sbatch, pseudolabel.sbatch or evaluate.sbatch.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from depth_anything.data.address import is_remote  # noqa: E402
from depth_anything.errors import UserError, format_error  # noqa: E402
from depth_anything.evaluation.benchmarks.benchmark_catalog import BENCHMARKS  # noqa: E402
from depth_anything.planning.pipeline import split_stages  # noqa: E402
from depth_anything.training.command import compose_config  # noqa: E402
from depth_anything.training.config import RunConfig  # noqa: E402
from depth_anything.training.run_dir import RunDir  # noqa: E402
from depth_anything.training.stage_networks import required_folders  # noqa: E402

KINDS = {"teacher": "teacher", "pseudolabel": "labels", "student": "student"}


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline.

    Attributes:
        kind: teacher, labels, student or evaluation.
        output: Its run folder, the folder of its label sets, or of its report.
        finished: Whether nothing is left to do.
        arguments: Of its batch script.
    """

    kind: str
    output: Path
    finished: bool
    arguments: Sequence[str]

    @property
    def job_name(self) -> str:
        """Name of its job, by which a later start of the pipeline finds it."""
        return f"{self.output.name}@{self.output.parent}"


def list_stages(overrides: Sequence[str], evaluate: Sequence[str]) -> Iterator[Stage]:
    """Yield the stages in their order.

    Args:
        overrides: Of train.py, for all stages that know their keys; encoder= chooses the students.
        evaluate: Arguments of depth-anything evaluate, besides weights and output; by default the validation set of
            the students, or all benchmarks below data_dir/benchmarks.

    Raises:
        UserError: For an override that no pipeline can have, or as train.py would say it.
    """
    typed_keys = {one.partition("=")[0].lstrip("+~"): one.partition("=")[2] for one in overrides}
    for key in ("stage", "name", "run_dir"):
        if key in typed_keys:
            raise UserError(f"{key}= would be the same in every stage of the pipeline", f"leave out {key}=")
    models: dict[str, Path] = {}
    config: RunConfig | None = None
    for arguments in split_stages(overrides):
        config = compose_config(arguments, ROOT / "configs")
        if config.stage == "teacher" and "teacher" in typed_keys:
            continue  # another teacher labels
        check_sets(config)
        if config.stage == "pseudolabel":
            assert config.labels is not None
            output, finished = Path(config.labels), all((Path(config.labels) / name / "manifest.json").is_file()
                                                        for name in config.data.sets)  # fmt: skip
        else:
            run = RunDir(config.run_dir)
            output, finished = run.path, run.finished(config.steps)
            models[run.path.name] = run.model
        yield Stage(KINDS[config.stage], output, finished, arguments)
    assert config is not None
    words = list(evaluate) or default_evaluation(config)
    if not words:
        print(
            "no evaluation: there is no validation set and no benchmark in data_dir/benchmarks; to add one, type for "
            "example  -- --benchmarks nyu kitti --root DIR",
            file=sys.stderr,
        )
        return
    output = Path(config.output_dir) / f"evaluation-{config.size}"
    weights = [f"{name}={model.parent}" for name, model in models.items()]
    words += ["--weights", *weights, "--output", str(output)]
    yield Stage("evaluation", output, is_newer(output, [*models.values()]), words)


def check_sets(config: RunConfig) -> None:
    """Check that the sets that no stage of the pipeline writes are there.

    Raises:
        UserError: Naming the first one that is not.
    """
    folders = [*config.data.sets.values()] if config.stage == "pseudolabel" else required_folders(config)
    scenes = {scene.root for scene in config.sources.scenes.values()}
    for folder in map(str, folders):
        if folder not in scenes and not is_remote(folder) and not Path(folder, "manifest.json").is_file():
            raise UserError(
                f"stage={config.stage} reads {folder}, which has no manifest.json",
                "write the set with slurm/submit.sh shard (docs/datasets.md), or choose others with sources=",
            )


def default_evaluation(config: RunConfig) -> list[str]:
    """Return the arguments of an evaluation that needs none of the user's; [] if there is nothing to evaluate on."""
    if config.sources.validation is not None:
        return ["--data", str(config.sources.validation)]
    root = Path(config.data_dir) / "benchmarks"
    names = [name for name in BENCHMARKS if (root / name).is_dir()]
    return ["--benchmarks", *names, "--root", str(root)] if names else []


def is_newer(report: Path, models: Sequence[Path]) -> bool:
    """Return whether there is a report that is newer than all models."""
    found = [path for path in (report / "results.json", report / "summary.json") if path.is_file()]
    times = [os.path.getmtime(path) if path.is_file() else float("inf") for path in models]
    return bool(found) and os.path.getmtime(found[0]) > max(times, default=0)


def main() -> None:
    """Print the stages."""
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    try:
        stages = list(list_stages(words[:split], words[split + 1 :]))
    except UserError as error:
        sys.exit(f"error: {format_error(error)}")
    for stage in stages:
        state = "finished" if stage.finished else "open"
        print(stage.kind, stage.job_name, state, shlex.join(stage.arguments), sep="\t")


if __name__ == "__main__":
    main()
