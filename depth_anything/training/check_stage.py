"""Checks of the keys that one stage alone has, against each other."""

import math
from collections.abc import Mapping

from depth_anything.errors import UserError
from depth_anything.training.config import RunConfig


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
