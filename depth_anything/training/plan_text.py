"""Texts of dry_run=true that several stages share."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from depth_anything.data.address import is_remote
from depth_anything.training.config import RecipeConfig, RunConfig

NOT_FOUND = " (not found yet)"

PlanLine = tuple[str, str]
"""A line of the plan: its heading, "" below another line of the same heading, and its text."""


def count_parameters(parameters: Iterable[Tensor]) -> str:
    """Return the number of values in parameters, with thousands separators."""
    return f"{sum(parameter.numel() for parameter in parameters):,}"


def is_local_set(root: str) -> bool:
    """Return whether a folder on this machine has a finished set; remote sets are not opened."""
    return not is_remote(root) and (Path(root) / "manifest.json").is_file()


def is_there(place: str) -> bool:
    """Return whether a file or folder exists; addresses are not opened."""
    return is_remote(place) or Path(place).exists()


def optimizer_name(config: RunConfig) -> str:
    """Return the class name of the optimizer."""
    return config.optimizer.target.rpartition(".")[2]


def schedule_line(config: RunConfig) -> PlanLine:
    """Describe the schedule of the learning rates."""
    recipe = config.recipe
    return "schedule", f"{recipe.schedule}, warm-up {recipe.warmup:.0%} of {config.steps:,} steps"


def describe_invariant_losses(recipe: RecipeConfig) -> str:
    """Describe the losses that ignore scale and shift, as those of teacher and student."""
    terms = [f"ssi {recipe.ssi_weight:g}", f"gm {recipe.gm_weight:g}"]
    if recipe.alignment_weight:
        terms.append(f"features {recipe.alignment_weight:g} (tolerance {recipe.alignment_tolerance:g})")
    if recipe.local_weight:
        terms.append(f"local {recipe.local_weight:g}")
    other = "" if recipe.normalization == "global" else f"; {recipe.normalization} normalization"
    if recipe.normalization in ("hybrid", "local"):
        other += f", {recipe.normalization_levels} levels"
    return f"{' : '.join(terms)}; largest {recipe.trim:.0%} of residuals ignored{other}"
