"""The hyperparameters of each stage, as dataclasses that check their values."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from depth_anything.training.config_schema import (
    CHANGE,
    DEPTH_STAGES,
    ECHO,
    ENCODER_FIT_STAGES,
    config_key,
    field_name,
    keys_of,
)
from depth_anything.training.value_rules import (
    BETAS,
    FRACTION,
    LEARNING_RATE,
    LOSS_WEIGHT,
    OPEN_FRACTION,
    check_value,
    choice,
    flag,
    integer,
    real,
)

SCHEDULES = ("constant", "linear", "cosine", "poly", "late-cosine")
NORMALIZATIONS = ("global", "hybrid", "local", "none")
"""Those of `losses.NORMALIZATIONS`, which imports torch."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The hyperparameters of a training run. configs/stage/*.yaml hold the paper's, docs/recipe.md the reasons.

    Attributes:
        steps: Optimizer steps of the whole run; the schedule ends there.
        encoder_lr: Learning rate of the encoder.
        head_lr: Learning rate of the DPT head.
        betas: Adam's betas.
        weight_decay: Decoupled weight decay; 0 is plain Adam, as in the paper.
        schedule: "constant", "linear", "cosine", "poly" or "late-cosine".
        warmup: Share of the run in which the rate climbs from near zero.
        clip_norm: Largest global gradient norm; None does not clip.
        ssi_weight: Weight of the scale-and-shift-invariant loss.
        gm_weight: Weight of the gradient-matching loss.
        gm_scales: Number of strided scales of the gradient-matching loss.
        trim: Share of the largest residuals of each image that the ssi loss ignores.
        gm_trim: The same for gradient matching.
        normalization: "global", "hybrid", "local" or "none": how the ssi loss normalizes both maps.
        normalization_levels: Number of divisions of the target's range with "hybrid" and "local": 1, 2, 4 … segments.
        local_weight: Weight of the loss against the labels of crops (student); 0 does not read them.
        alignment_weight: Weight of the feature-alignment loss (student); 0 disables it.
        alignment_tolerance: Tokens whose cosine similarity is above this add no loss.
        checkpointing: Recompute the encoder blocks in the backward pass.
        compile: Compile the encoder blocks in place.
    """

    steps: int = config_key(integer(1, 10**9, example=1000), resume=ECHO)
    encoder_lr: float = config_key(LEARNING_RATE, stages=ENCODER_FIT_STAGES, resume=CHANGE)
    head_lr: float = config_key(LEARNING_RATE, stages=ENCODER_FIT_STAGES, resume=CHANGE)
    betas: tuple[float, float] = config_key(BETAS, default=(0.9, 0.999), resume=CHANGE)
    weight_decay: float = config_key(real(0, 1, example=0.01), default=0.0, resume=CHANGE)
    schedule: str = config_key(choice(*SCHEDULES), default="linear", resume=CHANGE)
    warmup: float = config_key(FRACTION, default=0.0, resume=CHANGE)
    clip_norm: float | None = config_key(
        real(0, above=True, optional=True, example=1.0), default=None, resume=CHANGE
    )
    ssi_weight: float = config_key(
        LOSS_WEIGHT, default=1.0, stages=DEPTH_STAGES, resume=CHANGE, replay_only=True
    )
    gm_weight: float = config_key(
        LOSS_WEIGHT, default=2.0, stages=DEPTH_STAGES, resume=CHANGE, replay_only=True
    )
    gm_scales: int = config_key(
        integer(1, 10, example=4), default=4, stages=DEPTH_STAGES, resume=CHANGE, replay_only=True
    )
    trim: float = config_key(FRACTION, default=0.0, stages=DEPTH_STAGES, resume=CHANGE, replay_only=True)
    gm_trim: float = config_key(FRACTION, default=0.0, stages=DEPTH_STAGES, resume=CHANGE, replay_only=True)
    normalization: str = config_key(
        choice(*NORMALIZATIONS), default="global", stages=("teacher", "student"), resume=CHANGE
    )
    normalization_levels: int = config_key(
        integer(1, 8, example=3), default=3, stages=("teacher", "student"), resume=CHANGE
    )
    local_weight: float = config_key(LOSS_WEIGHT, default=0.0, stages=("student",), resume=CHANGE)
    alignment_weight: float = config_key(LOSS_WEIGHT, default=0.0, stages=("student",), resume=CHANGE)
    alignment_tolerance: float = config_key(
        real(-1, 1, example=0.85), default=0.85, stages=("student",), resume=CHANGE
    )
    checkpointing: bool = config_key(flag(), default=False, resume=CHANGE)
    compile: bool = config_key(flag(), default=False, stages=ENCODER_FIT_STAGES, resume=CHANGE)

    def __post_init__(self) -> None:
        """Check every value, so that a recipe built in Python is held to the ranges of the config.

        Raises:
            UserError: Naming the key and what it must be.
        """
        check_recipe_values(self, keys_of(type(self)))


def check_recipe_values(recipe: Any, names: Collection[str]) -> None:
    """Check the values of a recipe that `names` lists. Raises UserError, as `check_value`."""
    for name, known in keys_of(type(recipe)).items():
        if known.rule is not None and name in names:
            check_value(f"recipe.{name}", getattr(recipe, field_name(name)), known.rule)


@dataclass(frozen=True, kw_only=True)
class MetricRecipe(Recipe):
    """The hyperparameters of stage=metric; the invariant losses apply to replayed images only.

    Attributes:
        silog_weight: Weight of the SILog loss. It changes nothing for Adam, but clipping by `clip_norm` depends on it.
        variance_focus: 1 ignores a wrong scale completely, 0 does not ignore it at all.
    """

    silog_weight: float = config_key(LOSS_WEIGHT, default=1.0, stages=("metric",), resume=CHANGE)
    variance_focus: float = config_key(
        real(0, 1, example=0.5), default=0.5, stages=("metric",), resume=CHANGE
    )


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(Recipe):
    """The hyperparameters of stage=pretrain, masked autoencoding; the losses of depth maps do not apply.

    Attributes:
        mask_ratio: Share of the patches that the encoder does not see.
        normalize_targets: Predict the values of a patch minus its mean, divided by its deviation.
        decoder_width: Channels of the decoder.
        decoder_depth: Transformer blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
    """

    mask_ratio: float = config_key(OPEN_FRACTION, default=0.75, stages=("pretrain",), resume=CHANGE)
    normalize_targets: bool = config_key(flag(), default=True, stages=("pretrain",), resume=CHANGE)
    decoder_width: int = config_key(integer(4, 2**14, example=512), default=512, stages=("pretrain",))
    decoder_depth: int = config_key(integer(1, 100, example=8), default=8, stages=("pretrain",))
    decoder_heads: int = config_key(integer(1, 2**10, example=16), default=16, stages=("pretrain",))


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
