"""The hyperparameters of stage=controlnet, and the keys of a composed config that it does not have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from depth_anything.errors import UserError
from depth_anything.training.config import (
    CHANGE,
    ECHO,
    SCHEDULES,
    RecipeConfig,
    RunConfig,
    check_recipe_values,
    config_key,
    keys_of,
)
from depth_anything.training.value_rules import BETAS, FRACTION, LEARNING_RATE, choice, flag, integer, real


@dataclass(frozen=True, kw_only=True)
class ControlNetRecipe:
    """The hyperparameters of stage=controlnet; docs/recipe.md has their sources.

    Attributes:
        steps: Optimizer steps of the whole run; the schedule ends there.
        lr: Learning rate of the ControlNet, the only network that is trained.
        betas: Adam's betas.
        weight_decay: Decoupled weight decay.
        schedule: As `Recipe.schedule`.
        warmup: Share of the run in which the rate climbs from near zero.
        clip_norm: Largest global gradient norm; None does not clip.
        caption_dropout: Share of the samples whose caption is replaced by an empty one.
        checkpointing: Recompute the blocks of ControlNet and UNet in the backward pass.
    """

    steps: int = config_key(integer(1, 10**9, example=1000), resume=ECHO)
    lr: float = config_key(LEARNING_RATE, default=1e-5, stages=("controlnet",), resume=CHANGE)
    betas: tuple[float, float] = config_key(BETAS, default=(0.9, 0.999), resume=CHANGE)
    weight_decay: float = config_key(real(0, 1, example=0.01), default=0.01, resume=CHANGE)
    schedule: str = config_key(choice(*SCHEDULES), default="constant", resume=CHANGE)
    warmup: float = config_key(FRACTION, default=0.0, resume=CHANGE)
    clip_norm: float | None = config_key(
        real(0, above=True, optional=True, example=1.0), default=1.0, resume=CHANGE
    )
    caption_dropout: float = config_key(
        real(0, 1, example=0.5), default=0.5, stages=("controlnet",), resume=CHANGE
    )
    checkpointing: bool = config_key(flag(), default=False, resume=CHANGE)

    def __post_init__(self) -> None:
        """Check every value, as `Recipe` does."""
        check_recipe_values(self, keys_of(type(self)))


def check_controlnet(config: RunConfig) -> None:
    """Check what the schema cannot: that something is trained, and that no depth benchmark is to be validated on.

    Raises:
        UserError: Naming the key, and what to type.
    """
    if config.recipe.lr == 0:
        raise UserError("recipe.lr is 0, so nothing is trained", "type recipe.lr=1e-5")
    for name in ("benchmark", "root", "protocol", "max_depth"):
        if getattr(config.validation, name) is not None:
            raise UserError(
                f"validation.{name} is for depth, and stage=controlnet is validated on sources.validation",
                f"leave validation.{name} out, or type sources.validation=FOLDER for a set with depth and captions",
            )


def without_foreign_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out the keys that size=tiny sets for every stage where a stage does not know them."""
    if values.get("stage") == "pseudolabel":
        return {key: value for key, value in values.items() if key not in ("steps", "recipe", "perturb")}
    if values.get("stage") != "controlnet":
        return values
    kept = {key: value for key, value in values.items() if key not in ("encoder", "perturb")}
    foreign = {name for name, key in keys_of(RecipeConfig).items() if "controlnet" not in key.stages}

    def known(recipe: Any) -> Any:
        if not isinstance(recipe, Mapping):
            return recipe
        return {name: value for name, value in recipe.items() if name not in foreign}

    kept["recipe"] = known(kept.get("recipe"))
    if isinstance(kept.get("module"), Mapping):
        kept["module"] = {**kept["module"], "recipe": known(kept["module"].get("recipe"))}
    return kept
