"""The schema of a training config: type, range and stages of every key, and whether a resumed run may change it.

check_config.py converts the composed YAML files of configs/ into a `RunConfig`. The metadata of the fields below is
the only description of the keys: validation, suggestions, `--help` and resume all read it.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

from depth_anything.training.value_rules import (
    ANY,
    BETAS,
    CLASS_PATH,
    CROP_AREA,
    DEVICES,
    FOLDER,
    FRACTION,
    KEY_NAMES,
    LEARNING_RATE,
    LOSS_WEIGHT,
    OPEN_FRACTION,
    OPTIONAL_FILE,
    OPTIONAL_FOLDER,
    PRECISION,
    REPEAT,
    SEED,
    SET_NAMES,
    SKY,
    STRATEGY,
    ValueRule,
    check_value,
    choice,
    flag,
    integer,
    meters,
    real,
    text,
)

DEPTH_STAGES = ("teacher", "student", "metric")
FIT_STAGES = (*DEPTH_STAGES, "pretrain")
LABEL_STAGES = (*DEPTH_STAGES, "pseudolabel")
STAGES = (*FIT_STAGES, "pseudolabel")
SCHEDULES = ("constant", "linear", "cosine", "poly", "late-cosine")

# What a key may do when a run is resumed.
FREE = "free"
"""May differ at every start: where a run computes, what it prints, when it saves."""
CHANGE = "change"
"""May be changed on purpose: with resume_with= in the run's own folder, or with resume=CHECKPOINT in another."""
SAME = "same"
"""Never changes, neither in a run nor between a checkpoint and the run that resumes from it."""
START = "start"
"""Never changes in a run; does not matter to a run that resumes from the checkpoint of another run."""
ECHO = "echo"
"""Repeats another key, which is compared in its place."""


@dataclass(frozen=True)
class ConfigKey:
    """What the schema says about one key.

    Attributes:
        rule: Rule of the value; None for sections and mappings.
        stages: Stages that know the key.
        resume: FREE, CHANGE, SAME, START or ECHO.
        section: Dataclass of the keys below this one.
        entries: For a mapping whose names the user chooses: describes its values.
        is_open: The section takes more keys: the arguments of the class that its `_target_` names.
        holds_nodes: For a mapping {NAME: node} of objects that Hydra builds, as `callbacks`.
        replay_only: In stage=metric the key only matters with `replay`.
        repeats_run: A key of `data` that must equal the key of the run of the same name.
    """

    rule: ValueRule | None = None
    stages: tuple[str, ...] = STAGES
    resume: str = SAME
    section: "type[ConfigSection] | None" = None
    entries: "ConfigKey | None" = None
    is_open: bool = False
    holds_nodes: bool = False
    replay_only: bool = False
    repeats_run: bool = False


def config_key(rule: ValueRule | None = None, *, default: Any = MISSING, **settings: Any) -> Any:
    """Declare a key of the schema. A key without a default must be in every config of a stage that knows it."""
    return field(default=default, metadata={"key": ConfigKey(rule, **settings)})


def keys_of(section: type) -> dict[str, ConfigKey]:
    """Return the keys of a dataclass of the schema by name."""
    fields: dict[str, Any] = vars(section)["__dataclass_fields__"]
    return {_key_name(name): item.metadata["key"] for name, item in fields.items() if "key" in item.metadata}


def default_value(section: type, name: str) -> Any:
    """Return the value that an absent key has; MISSING where it must be present."""
    item = vars(section)["__dataclass_fields__"].get(field_name(name))
    return MISSING if item is None else item.default


def field_name(key: str) -> str:
    """Return the name of the dataclass field that holds a key: `target` for `_target_`."""
    return "target" if key == "_target_" else key


def _key_name(field_name: str) -> str:
    return "_target_" if field_name == "target" else field_name


@dataclass(frozen=True, kw_only=True)
class ConfigSection:
    """A part of a config: a field for each key of the schema, and `arguments` for the other keys of an open section.

    A field whose key is neither in the config nor has a default is None, as `steps` of stage=pseudolabel.

    Attributes:
        arguments: Keys that are not in the schema, for the class that `_target_` names.
        composed_keys: The keys that the composed config has, in its order; () means all keys of the schema.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    composed_keys: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def has(self, key: str) -> bool:
        """Return whether the composed config has the key."""
        return key in (self.composed_keys or keys_of(type(self)))

    def as_dict(self) -> dict[str, Any]:
        """Return the section as plain values, as YAML holds it and Hydra's `instantiate` takes it."""
        known = keys_of(type(self))
        names = self.composed_keys or (*known, *self.arguments)
        return {
            name: _as_plain(getattr(self, field_name(name)) if name in known else self.arguments[name])
            for name in names
        }


def _as_plain(value: Any) -> Any:
    if isinstance(value, ConfigSection):
        return value.as_dict()
    if isinstance(value, Mapping):
        return {name: _as_plain(item) for name, item in value.items()}
    return [_as_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


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
        alignment_weight: Weight of the feature-alignment loss (student); 0 disables it.
        alignment_tolerance: Tokens whose cosine similarity is above this add no loss.
        checkpointing: Recompute the encoder blocks in the backward pass.
        compile: Compile the encoder blocks in place.
    """

    steps: int = config_key(integer(1, 10**9, example=1000), resume=ECHO)
    encoder_lr: float = config_key(LEARNING_RATE, resume=CHANGE)
    head_lr: float = config_key(LEARNING_RATE, resume=CHANGE)
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
    alignment_weight: float = config_key(LOSS_WEIGHT, default=0.0, stages=("student",), resume=CHANGE)
    alignment_tolerance: float = config_key(
        real(-1, 1, example=0.85), default=0.85, stages=("student",), resume=CHANGE
    )
    checkpointing: bool = config_key(flag(), default=False, resume=CHANGE)
    compile: bool = config_key(flag(), default=False, resume=CHANGE)

    def __post_init__(self) -> None:
        """Check every value, so that a recipe built in Python is held to the ranges of the config.

        Raises:
            UserError: Naming the key and what it must be.
        """
        for name, known in keys_of(type(self)).items():
            if known.rule is not None:
                check_value(f"recipe.{name}", getattr(self, field_name(name)), known.rule)


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
class RecipeConfig(MetricRecipe, PretrainRecipe, ConfigSection):
    """The `recipe` section: the hyperparameters of any stage, and the class that holds them."""

    target: str = config_key(CLASS_PATH, resume=START)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(ConfigSection):
    """When checkpoints are written, in optimizer steps, and how many are kept."""

    every: int = config_key(integer(1, example=2000))
    keep: int = config_key(integer(1, example=2))


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(ConfigSection):
    """When metrics are logged, in optimizer steps."""

    every: int = config_key(integer(1, example=50))


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(ConfigSection):
    """What a run is validated on, and when, in optimizer steps."""

    every: int = config_key(integer(1, example=5000))
    limit: int = config_key(integer(1, example=256))
    benchmark: str | None = config_key(text("a benchmark", example="nyu", optional=True), default=None)
    root: str | None = config_key(OPTIONAL_FOLDER, default=None)
    protocol: str | None = config_key(text("a protocol", example="da2", optional=True), default=None)
    max_depth: float | None = config_key(meters(example=20, optional=True), default=None)


@dataclass(frozen=True, kw_only=True)
class SceneSetConfig(ConfigSection):
    """A procedural set that is written on first use."""

    root: str = config_key(FOLDER)
    look: str = config_key(choice("synthetic", "photographic"))
    count: int = config_key(integer(1, 10_000_000, example=768))
    seed: int = config_key(integer(0, example=1))
    height: int = config_key(integer(14, example=112))
    width: int = config_key(integer(14, example=144))
    labelled: bool = config_key(flag(), default=True)
    per_shard: int = config_key(integer(1, example=128), default=128)
    degraded: bool = config_key(flag(), default=False)
    layout: str = config_key(choice("classic", "varied"), default="classic")


@dataclass(frozen=True, kw_only=True)
class SourcesConfig(ConfigSection):
    """The data sets of a run, {NAME: folder, URL or command}, and what they imply for stage=metric."""

    labelled: dict[str, str] = config_key(entries=ConfigKey(FOLDER), resume=START)
    images: dict[str, str] = config_key(entries=ConfigKey(FOLDER), resume=START)
    validation: str | None = config_key(OPTIONAL_FOLDER, resume=FREE)
    scenes: dict[str, SceneSetConfig] = config_key(entries=ConfigKey(section=SceneSetConfig), resume=START)
    metric: dict[str, str] | None = config_key(entries=ConfigKey(FOLDER), default=None, resume=ECHO)
    max_depth: float | None = config_key(meters(example=20, optional=True), default=None, resume=ECHO)
    steps: int | None = config_key(integer(1, example=1000, optional=True), default=None, resume=ECHO)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ConfigSection):
    """Parts of the network that can be replaced: `head` is the node of a decoder, null the DPT head."""

    head: dict[str, Any] | None = config_key(ANY, default=None)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(ConfigSection):
    """The optimizer: its class and arguments. It is called with the two parameter groups, which hold their rates."""

    target: str = config_key(CLASS_PATH, default="torch.optim.AdamW")
    betas: Any = config_key(ANY, default=None, resume=ECHO)
    weight_decay: Any = config_key(ANY, default=None, resume=ECHO)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(ConfigSection):
    """Lightning's Trainer; its other arguments are added as +trainer.NAME=VALUE."""

    target: str = config_key(CLASS_PATH, resume=START)
    accelerator: str = config_key(text("an accelerator of Lightning", example="auto"), resume=FREE)
    devices: Any = config_key(DEVICES, resume=FREE)
    num_nodes: int = config_key(integer(1, example=1), resume=FREE)
    strategy: Any = config_key(STRATEGY, resume=FREE)
    precision: Any = config_key(PRECISION, resume=CHANGE)


@dataclass(frozen=True, kw_only=True)
class ModuleConfig(ConfigSection):
    """The LightningModule of the stage; a class of your own takes arguments of its own."""

    target: str = config_key(CLASS_PATH, resume=START)
    recipe: Any = config_key(ANY, default=None, stages=FIT_STAGES, resume=ECHO)


@dataclass(frozen=True, kw_only=True)
class DataConfig(ConfigSection):
    """The arguments of the stage's DataModule; most repeat keys of the run."""

    target: str = config_key(CLASS_PATH, resume=START)
    sets: dict[str, str] = config_key(entries=ConfigKey(FOLDER), resume=START)
    labels: str | None = config_key(OPTIONAL_FOLDER, stages=LABEL_STAGES, resume=ECHO)
    seed: int = config_key(SEED, stages=FIT_STAGES, resume=ECHO, repeats_run=True)
    batch_size: int = config_key(integer(1, 10**6, example=16), resume=ECHO, repeats_run=True)
    streams: int = config_key(
        integer(1, 10**7, example=128), stages=FIT_STAGES, resume=ECHO, repeats_run=True
    )
    image_size: int = config_key(integer(1, 2**14, example=518), resume=ECHO, repeats_run=True)
    workers: int = config_key(integer(0, 1024, example=4), resume=FREE, repeats_run=True)
    labelled: dict[str, str] = config_key(entries=ConfigKey(FOLDER), stages=("student",), resume=ECHO)
    mix: Any = config_key(SET_NAMES, stages=("student",), resume=ECHO, repeats_run=True)
    sky: Any = config_key(SKY, stages=DEPTH_STAGES, resume=ECHO)
    perturb: bool = config_key(flag(), stages=DEPTH_STAGES, resume=ECHO, repeats_run=True)
    cutmix: bool = config_key(flag(), stages=("student",), resume=ECHO, repeats_run=True)
    repeat: dict[str, int] | None = config_key(REPEAT, stages=FIT_STAGES)
    images: dict[str, str] = config_key(entries=ConfigKey(FOLDER), stages=("metric",), resume=ECHO)
    replay: Any = config_key(SET_NAMES, stages=("metric",), resume=ECHO, repeats_run=True)
    replay_share: float = config_key(OPEN_FRACTION, stages=("metric",), resume=ECHO, repeats_run=True)
    crop_area: Any = config_key(CROP_AREA, stages=("pretrain",), resume=ECHO, repeats_run=True)
    allow_partial: bool = config_key(flag(), stages=("student", "metric"), resume=FREE, repeats_run=True)
    min_depth: float = config_key(ANY, stages=("metric",), resume=ECHO, repeats_run=True)
    max_depth: float = config_key(ANY, stages=("metric",), resume=ECHO, repeats_run=True)
    run_dir: str = config_key(FOLDER, stages=FIT_STAGES, resume=FREE, repeats_run=True)
    precision: str = config_key(ANY, stages=("pseudolabel",), resume=ECHO)
    codec: str = config_key(choice("q12", "f32"), stages=("pseudolabel",))


@dataclass(frozen=True, kw_only=True)
class TinyConfig(ConfigSection):
    """The values of size=tiny for the encoders that start from random weights, {ENCODER: VALUE}."""

    steps: dict[str, int] = config_key(
        entries=ConfigKey(integer(1, example=400)), stages=FIT_STAGES, default=None
    )
    rate: dict[str, float] = config_key(entries=ConfigKey(LEARNING_RATE), default=None)


@dataclass(frozen=True, kw_only=True)
class RunConfig(ConfigSection):
    """A training or labeling run: every key of configs/train.yaml and of the groups below it."""

    name: str = config_key(text("the name of a run", example="second"), resume=FREE)
    output_dir: str = config_key(FOLDER, resume=FREE)
    run_dir: str = config_key(FOLDER, resume=FREE)
    data_dir: str = config_key(FOLDER, resume=START)
    photos: str = config_key(FOLDER, resume=START)
    seed: int = config_key(SEED)
    workers: int = config_key(integer(0, 1024, example=4), resume=FREE)
    micro_batch: int | None = config_key(integer(1, optional=True, example=4), resume=FREE)
    streams: int | None = config_key(integer(1, 10**7, optional=True, example=128), default=None)
    init: str | None = config_key(OPTIONAL_FILE, resume=START)
    resume: str | None = config_key(OPTIONAL_FILE, resume=FREE)
    resume_with: Any = config_key(KEY_NAMES, default=None, resume=FREE)
    overwrite: bool = config_key(flag(), resume=FREE)
    allow_partial: bool = config_key(flag(), resume=FREE)
    dry_run: bool = config_key(flag(), resume=FREE)
    checkpoint: CheckpointConfig = config_key(section=CheckpointConfig, resume=FREE)
    logging: LoggingConfig = config_key(section=LoggingConfig, resume=FREE)
    validation: ValidationConfig = config_key(section=ValidationConfig, resume=FREE)
    stage: str = config_key(text("a stage", example="teacher"))
    size: str = config_key(text("a size", example="tiny"), resume=START)
    encoder: str = config_key(text("an encoder", example="vits"))
    batch_size: int = config_key(integer(1, 10**6, example=16))
    steps: int = config_key(integer(1, 10**9, example=1000), stages=FIT_STAGES, resume=CHANGE)
    image_size: int = config_key(integer(1, 2**14, example=518))
    perturb: bool = config_key(flag(), default=False, stages=DEPTH_STAGES, resume=CHANGE)
    sky: Any = config_key(SKY, default=None, stages=("teacher", "student"))
    mix: Any = config_key(SET_NAMES, default=None, stages=("student",))
    cutmix: bool = config_key(flag(), default=False, stages=("student",), resume=CHANGE)
    labels: str | None = config_key(
        OPTIONAL_FOLDER, stages=("student", "metric", "pseudolabel"), resume=START, replay_only=True
    )
    teacher: str = config_key(text("a file", example="FILE"), stages=("pseudolabel",), resume=START)
    start: str | None = config_key(choice("encoder", "all"), stages=("metric",), resume=START)
    freeze_encoder: bool = config_key(flag(), default=False, stages=("metric",))
    lora: int | None = config_key(integer(1, optional=True, example=8), default=None, stages=("metric",))
    max_depth: float | None = config_key(meters(example=20), stages=("metric",))
    min_depth: float | None = config_key(meters(example=0.001), stages=("metric",))
    replay: Any = config_key(SET_NAMES, default=None, stages=("metric",))
    replay_share: float = config_key(OPEN_FRACTION, default=0.1, stages=("metric",), replay_only=True)
    crop_area: Any = config_key(CROP_AREA, default=(0.2, 1.0), stages=("pretrain",), resume=CHANGE)
    sources: SourcesConfig = config_key(section=SourcesConfig)
    recipe: RecipeConfig = config_key(section=RecipeConfig, stages=FIT_STAGES, is_open=True)
    model: ModelConfig = config_key(section=ModelConfig, default=ModelConfig())
    module: ModuleConfig = config_key(section=ModuleConfig, is_open=True)
    optimizer: OptimizerConfig = config_key(
        section=OptimizerConfig, default=OptimizerConfig(), stages=FIT_STAGES, is_open=True
    )
    data: DataConfig = config_key(section=DataConfig, is_open=True)
    trainer: TrainerConfig = config_key(section=TrainerConfig, is_open=True)
    callbacks: dict[str, Any] = config_key(holds_nodes=True, default=None, resume=CHANGE)
    logger: dict[str, Any] = config_key(holds_nodes=True, default=None, resume=FREE)
    tiny: TinyConfig | None = config_key(section=TinyConfig, default=None, resume=FREE)
