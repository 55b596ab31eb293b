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
from depth_anything.data.store import ObjectStore, open_store  # noqa: E402
from depth_anything.errors import UserError, format_error  # noqa: E402
from depth_anything.evaluation.benchmarks.benchmark_catalog import BENCHMARKS  # noqa: E402
from depth_anything.planning.pipeline import split_stages  # noqa: E402
from depth_anything.training.check_config import USER_ERRORS  # noqa: E402
from depth_anything.training.command import compose_config  # noqa: E402
from depth_anything.training.config import RunConfig  # noqa: E402
from depth_anything.training.run_dir import is_finished  # noqa: E402
from depth_anything.training.stage_networks import required_folders  # noqa: E402

KINDS = {"teacher": "teacher", "pseudolabel": "labels", "student": "student"}


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline.

    Attributes:
        kind: teacher, labels, student or evaluation.
        output: Path or address of its run folder, of the folder of its label sets, or of its report.
        finished: Whether nothing is left to do.
        arguments: Of its batch script.
    """

    kind: str
    output: str
    finished: bool
    arguments: Sequence[str]

    @property
    def job_name(self) -> str:
        """Name of its job, by which a later start of the pipeline finds it."""
        parent, _, name = self.output.rpartition("/")
        return f"{name}@{parent}"


def list_stages(overrides: Sequence[str], evaluate: Sequence[str]) -> Iterator[Stage]:
    """Yield the stages in their order.

    Args:
        overrides: Of train.py, for all stages that know their keys; encoder= chooses the students.
        evaluate: Arguments of depth-anything evaluate, besides weights and output; by default the validation set of
            the students, or all benchmarks below data_dir/benchmarks.

    Raises:
        UserError: For an override that no pipeline can have, or as train.py would say it.
        StorageUnavailable: An object store does not answer.
    """
    typed_keys = {one.partition("=")[0].lstrip("+~"): one.partition("=")[2] for one in overrides}
    for key in ("stage", "name", "run_dir"):
        if key in typed_keys:
            raise UserError(f"{key}= would be the same in every stage of the pipeline", f"leave out {key}=")
    models: dict[str, str] = {}
    config: RunConfig | None = None
    for arguments in split_stages(overrides):
        config = compose_config(arguments, ROOT / "configs")
        if config.stage == "teacher" and "teacher" in typed_keys:
            continue  # another teacher labels
        check_sets(config)
        if config.stage == "pseudolabel":
            assert config.labels is not None
            stores = [open_store(f"{config.labels}/{name}") for name in config.data.sets]
            output, finished = config.labels, all(store.exists("manifest.json") for store in stores)
        else:
            output, finished = config.run_dir, is_finished(open_store(config.run_dir), config.steps)
            models[config.name] = config.run_dir
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
    parent = "outputs" if is_remote(config.output_dir) else config.output_dir  # its tasks share a folder
    output = f"{parent}/evaluation-{config.size}"
    weights = [f"{name}={run_dir}" for name, run_dir in models.items()]
    words += ["--weights", *weights, "--output", output]
    yield Stage("evaluation", output, is_newer(Path(output), [*models.values()]), words)


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


def is_newer(report: Path, run_dirs: Sequence[str]) -> bool:
    """Return whether there is a report that is newer than the models of all runs."""
    found = [path for path in (report / "results.json", report / "summary.json") if path.is_file()]
    return bool(found) and os.path.getmtime(found[0]) > max(map(model_time, run_dirs), default=0)


def model_time(run_dir: str) -> float:
    """Return when the model of a run was written, in seconds since 1970; infinity if there is none."""
    store = open_store(run_dir)
    if isinstance(store, ObjectStore):
        info = store.info("model.safetensors")
        return float("inf") if info is None else info.modified
    model = Path(run_dir, "model.safetensors")
    return os.path.getmtime(model) if model.is_file() else float("inf")


def main() -> None:
    """Print the stages."""
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    try:
        stages = list(list_stages(words[:split], words[split + 1 :]))
    except USER_ERRORS as error:
        sys.exit(f"error: {format_error(error)}")
    for stage in stages:
        state = "finished" if stage.finished else "open"
        print(stage.kind, stage.job_name, state, shlex.join(stage.arguments), sep="\t")


if __name__ == "__main__":
    main()
