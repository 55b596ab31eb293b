"""The plan of a whole pipeline, or of one stage, from the overrides of train.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from depth_anything.errors import UserError
from depth_anything.planning.assumptions import Cluster
from depth_anything.planning.stage_plan import StagePlan, count_network, plan_stage
from depth_anything.training.batch_plan import extra_sets
from depth_anything.training.check_config import find_key
from depth_anything.training.command import CONFIG_GROUPS, compose_config

PAPER_STUDENTS = ("vits", "vitb", "vitl")
"""Students of size=paper, unless encoder= chooses others."""


@dataclass(frozen=True)
class PipelinePlan:
    """Stages that run one after another.

    Attributes:
        overrides: As typed.
        cluster: Where they run.
        stages: In order.
    """

    overrides: tuple[str, ...]
    cluster: Cluster
    stages: tuple[StagePlan, ...]

    @property
    def hours(self) -> float:
        """Wall time of all stages, one after another."""
        return sum(stage.hours for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all stages."""
        return sum(stage.gpu_hours for stage in self.stages)

    @property
    def cost(self) -> float | None:
        """Cost of all stages; None without a price."""
        costs = [stage.cost for stage in self.stages if stage.cost is not None]
        return sum(costs) if costs else None


def plan_pipeline(
    overrides: Sequence[str],
    configs: Path,
    clusters: Sequence[Cluster],
    *,
    records: Mapping[str, int] | None = None,
) -> list[PipelinePlan]:
    """Plan the stages that overrides choose on each of several clusters.

    Args:
        overrides: As typed after train.py. Without stage= all stages are planned: a teacher, its labels, and students;
            encoder= then chooses the students, as encoder=vits,vitb, and another key goes to every stage that knows it.
        configs: Folder of the config files.
        clusters: Where the stages run.
        records: Set to number of records, for sets that do not exist yet.

    Raises:
        UserError: As `python train.py` would, or if a stage cannot be planned.
    """
    composed = [compose_config(typed, configs) for typed in split_stages(overrides)]
    stages = [(config, count_network(config)) for config in composed]
    read = {
        name
        for config in composed
        for sets in (config.data.sets, *extra_sets(config).values())
        for name in sets
    }
    if unknown := [name for name in records or {} if name not in read]:
        raise UserError(
            f"no stage reads a set named {unknown[0]}",
            f"type --records with the name of one that is read ({', '.join(sorted(read))})",
        )
    return [
        PipelinePlan(
            tuple(overrides),
            cluster,
            tuple(plan_stage(config, network, cluster, records or {}) for config, network in stages),
        )
        for cluster in clusters
    ]


def split_stages(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each stage that the overrides of a pipeline choose.

    Example:
        >>> for typed in split_stages(["size=paper", "encoder=vits", "steps=10"]): print(*typed)
        size=paper steps=10 stage=teacher
        size=paper stage=pseudolabel
        size=paper steps=10 stage=student encoder=vits
    """
    names = [_key(one) for one in overrides]
    if "stage" in names:
        return [list(overrides)]
    students: Sequence[str] = PAPER_STUDENTS if "size=paper" in overrides else ()
    for one in overrides:
        if _key(one) == "encoder":
            students = one.partition("=")[2].strip("[]").split(",")
    common = [one for one in overrides if _key(one) != "encoder"]
    shared = {
        stage: [one for one in common if _knows(stage, _key(one)) and not _is_for_training(stage, one)]
        for stage in ("teacher", "pseudolabel", "student")
    }
    chosen = [[f"encoder={encoder.strip()}"] for encoder in students] or [[]]
    return [
        [*shared["teacher"], "stage=teacher"],
        [*shared["pseudolabel"], "stage=pseudolabel"],
        *([*shared["student"], "stage=student", *encoder] for encoder in chosen),
    ]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _is_for_training(stage: str, override: str) -> bool:
    """Return whether the labels reject an override: they read every image once, with a whole network on each device."""
    return stage == "pseudolabel" and (_key(override) == "stage_to" or override == "trainer=fsdp")


def _knows(stage: str, path: str) -> bool:
    """Return whether a stage knows a key; one that nobody knows is left to the stages, which refuse it."""
    parts = path.split(".")
    keys = [find_key(".".join(parts[:length]))[0] for length in range(1, len(parts) + 1)]
    return path in CONFIG_GROUPS or all(key is None or stage in key.stages for key in keys)
