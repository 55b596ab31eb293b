"""Checks of the keys that one stage alone has, against each other."""

import math
from collections.abc import Mapping
from typing import Any

from depth_anything.errors import UserError
from depth_anything.training.config import RecipeConfig, RunConfig
from depth_anything.training.config_schema import keys_of
from depth_anything.training.value_rules import format_value


def check_metric_stage(config: RunConfig) -> None:
    """Check the depth range, the sky and the adapters of stage=metric.

    Raises:
        UserError: Naming the key, and what to type.
    """
    near, far, rank, sky = config.min_depth, config.max_depth, config.lora, config.data.sky
    assert near is not None and far is not None
    if near >= far:
        raise UserError(f"min_depth={near} must be less than max_depth={far}", "type min_depth=0.001")
    if sky not in ("invalid", None) and not isinstance(sky, Mapping):
        raise UserError(f"data.sky={sky}: the sky has no depth in meters", "type data.sky=invalid")
    if rank is None:
        return
    if config.freeze_encoder:
        raise UserError(
            f"lora={rank} trains adapters in the encoder, but freeze_encoder=true",
            "type freeze_encoder=false",
        )
    from depth_anything.model.lora import import_peft

    import_peft()


def check_pretrain_stage(config: RunConfig) -> None:
    """Check the decoder and the sets of stage=pretrain, which has no depth.

    Raises:
        UserError: Naming the key, and what to type.
    """
    recipe, data = config.recipe, config.data
    if config.model.head is not None:
        raise UserError("model.head is a decoder of depth, and stage=pretrain has none", "leave it out")
    if config.validation.benchmark is not None:
        raise UserError(
            "validation.benchmark scores depth, and stage=pretrain predicts none",
            "type validation.benchmark=null",
        )
    if recipe.decoder_width % recipe.decoder_heads or recipe.decoder_width % 4:
        step = math.lcm(4, recipe.decoder_heads)
        raise UserError(
            f"recipe.decoder_width={recipe.decoder_width} is not a multiple of 4 and of "
            f"recipe.decoder_heads={recipe.decoder_heads}",
            f"type recipe.decoder_width={max(1, round(recipe.decoder_width / step)) * step}",
        )
    if data.has("sets") and not data.sets:
        raise UserError(
            "stage=pretrain has no images: sources.images is empty", "type '+sources.images.NAME=FOLDER'"
        )


def check_controlnet_stage(config: RunConfig) -> None:
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
    if values.get("stage") == "pretrain":
        return {key: value for key, value in values.items() if key != "perturb"}
    if values.get("stage") != "controlnet":
        return values
    kept = {key: value for key, value in values.items() if key not in ("encoder", "perturb")}
    if kept.get("init") == "scratch":  # the random weights of an encoder
        kept["init"] = None
    foreign = {name for name, key in keys_of(RecipeConfig).items() if "controlnet" not in key.stages}

    def known(recipe: Any) -> Any:
        if not isinstance(recipe, Mapping):
            return recipe
        return {name: value for name, value in recipe.items() if name not in foreign}

    kept["recipe"] = known(kept.get("recipe"))
    if isinstance(kept.get("module"), Mapping):
        kept["module"] = {**kept["module"], "recipe": known(kept["module"].get("recipe"))}
    return kept


def check_pseudolabel_stage(config: RunConfig) -> None:
    """Check the keys of stage=pseudolabel, also those of several teachers that the teachers of the run do not use.

    Raises:
        UserError: Naming the key, and what to type.
    """
    if config.stage_to is not None:
        raise UserError(
            "stage=pseudolabel reads every image once, and never copies a set", "leave out stage_to"
        )
    from depth_anything.training.work_share import choose_share  # imports numpy

    choose_share(config.share, [])
    several, shares = len(config.teachers) > 1, config.teacher_shares
    if not several and (config.label_confidence or config.teacher_rule == "confidence"):
        key = "label_confidence=true" if config.label_confidence else "teacher_rule=confidence"
        raise UserError(f"{key} needs several teachers to compare", "type 'teacher=[A,B]'")
    if shares is not None and (config.teacher_rule != "random" or len(shares) != len(config.teachers)):
        raise UserError(
            f"teacher_shares={format_value(shares)} is for teacher_rule=random and one number for each of the "
            f"{len(config.teachers)} teachers",
            "type teacher_shares=null",
        )
