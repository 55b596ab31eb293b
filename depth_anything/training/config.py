"""The schema of a training config: type, range and stages of every key, and whether a resumed run may change it.

check_config.py converts the composed YAML files of configs/ into a `RunConfig`. The metadata of the fields below is
the only description of the keys: validation, suggestions, `--help` and resume all read it.
"""

from dataclasses import dataclass, fields
from typing import Any

from depth_anything.scenes.scene_set import LAYOUTS, LOOKS, SceneSetSpec
from depth_anything.training.config_schema import (
    CHANGE,
    DEPTH_STAGES,
    ECHO,
    ENCODER_STAGES,
    FIT_STAGES,
    FREE,
    LABEL_STAGES,
    START,
    ConfigKey,
    ConfigSection,
    config_key,
    keys_of,
)
from depth_anything.training.recipes import MetricRecipe, PretrainRecipe, check_recipe_values
from depth_anything.training.value_rules import (
    ANY,
    CLASS_PATH,
    CONFIDENCE,
    CROP_AREA,
    DEVICES,
    FOCAL,
    FOLDER,
    FOV,
    KEY_NAMES,
    LEARNING_RATE,
    LOCAL_FOLDER,
    LOSS_WEIGHT,
    NODE_FOLDER,
    OPEN_FRACTION,
    OPTIONAL_FILE,
    OPTIONAL_FOLDER,
    PRECISION,
    REPEAT,
    RUN_NAME,
    SCALE_RANGE,
    SEED,
    SET_NAMES,
    SHARE,
    SHARE_OF_WORK,
    SHARES,
    SKY,
    STRATEGY,
    TEACHER,
    choice,
    flag,
    integer,
    meters,
    real,
    text,
)

LABEL_WEIGHTS = ("none", "weight", "mask")
"""Those of `data.label_fields.LABEL_WEIGHTS`, which imports torch."""
TEACHER_RULES = ("first", "random", "mean", "confidence")
"""Those of `teachers.combine.RULES`, which imports torch."""


@dataclass(frozen=True, kw_only=True)
class RecipeConfig(MetricRecipe, PretrainRecipe, ConfigSection):
    """The `recipe` section: the hyperparameters of any stage, and the class that holds them.

    `lr` and `caption_dropout` are those of stage=controlnet (`ControlNetRecipe`). Keys of other stages are None, or
    their default.
    """

    target: str = config_key(CLASS_PATH, resume=START)
    lr: float = config_key(LEARNING_RATE, default=1e-5, stages=("controlnet",), resume=CHANGE)
    caption_dropout: float = config_key(
        real(0, 1, example=0.5), default=0.5, stages=("controlnet",), resume=CHANGE
    )

    def __post_init__(self) -> None:
        """Check the values of the keys that the config has."""
        check_recipe_values(self, self.composed_keys or keys_of(type(self)))


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(ConfigSection):
    """When checkpoints are written, in optimizer steps, and how many are kept."""

    every: int = config_key(integer(1, example=2000))
    keep: int = config_key(integer(1, example=2))
    keep_every: int | None = config_key(integer(1, optional=True, example=20000), default=None)
    asynchronous: bool = config_key(flag(), default=False)


@dataclass(frozen=True, kw_only=True)
class MirrorConfig(ConfigSection):
    """For `output_dir` in an object store: the local folder of the run, and when it is uploaded, in seconds."""

    folder: str | None = config_key(LOCAL_FOLDER, default=None)
    every: float = config_key(real(0, above=True, unit="of seconds", example=15), default=15.0)
    patience: float = config_key(real(0, unit="of seconds", example=3600), default=3600.0)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(ConfigSection):
    """When metrics are logged, in optimizer steps."""

    every: int = config_key(integer(1, example=50))


@dataclass(frozen=True, kw_only=True)
class GuardsConfig(ConfigSection):
    """What happens at steps that are not finite, and at losses far above the usual (docs/guards.md)."""

    max_skipped: int = config_key(integer(1, example=3), default=3)
    spike: str = config_key(choice("warn", "skip", "rewind"), default="warn")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(ConfigSection):
    """What a run is validated on, and when, in optimizer steps."""

    every: int = config_key(integer(1, example=5000))
    limit: int = config_key(integer(1, example=256))
    benchmark: str | None = config_key(text("a benchmark", example="nyu", optional=True), default=None)
    root: str | None = config_key(OPTIONAL_FOLDER, default=None)
    protocol: str | None = config_key(text("a protocol", example="da2", optional=True), default=None)
    max_depth: float | None = config_key(meters(example=20, optional=True), default=None)
    sampling_steps: int = config_key(integer(1, 1000, example=20), default=20, stages=("controlnet",))


@dataclass(frozen=True, kw_only=True)
class SceneSetConfig(ConfigSection):
    """A procedural set that is written on first use."""

    root: str = config_key(FOLDER)
    look: str = config_key(choice(*LOOKS))
    count: int = config_key(integer(1, 10_000_000, example=768))
    seed: int = config_key(integer(0, example=1))
    height: int = config_key(integer(14, example=112))
    width: int = config_key(integer(14, example=144))
    labelled: bool = config_key(flag(), default=True)
    per_shard: int = config_key(integer(1, example=128), default=128)
    layout: str = config_key(choice(*LAYOUTS), default="classic")
    classes: bool = config_key(flag(), default=False)
    captioned: bool = config_key(flag(), default=False)
    degraded: bool = config_key(flag(), default=False)
    fov: tuple[float, float] | None = config_key(FOV, default=None)

    @property
    def spec(self) -> SceneSetSpec:
        """The scenes of the set."""
        values = {item.name: getattr(self, item.name) for item in fields(SceneSetSpec)}
        return SceneSetSpec(**{**values, "fov": None if self.fov is None else (self.fov[0], self.fov[1])})


@dataclass(frozen=True, kw_only=True)
class SegmentationSourceConfig(ConfigSection):
    """What a source implies for stage=segmentation; `validation` is a set with class maps."""

    validation: str | None = config_key(OPTIONAL_FOLDER, default=None, resume=FREE)
    steps: int | None = config_key(integer(1, example=1000, optional=True), default=None, resume=ECHO)
    warmup: float | None = config_key(ANY, default=None, resume=ECHO)
    short_side: int | None = config_key(
        integer(1, 2**14, example=896, optional=True), default=None, resume=ECHO
    )
    stride: int | None = config_key(integer(1, 2**14, example=426, optional=True), default=None, resume=ECHO)


@dataclass(frozen=True, kw_only=True)
class SourcesConfig(ConfigSection):
    """The data sets of a run, {NAME: folder, URL or command}, and what they imply for stage=metric."""

    labelled: dict[str, str] = config_key(entries=ConfigKey(FOLDER), names_sets=True, resume=START)
    images: dict[str, str] = config_key(entries=ConfigKey(FOLDER), names_sets=True, resume=START)
    validation: str | None = config_key(OPTIONAL_FOLDER, resume=FREE)
    scenes: dict[str, SceneSetConfig] = config_key(entries=ConfigKey(section=SceneSetConfig), resume=START)
    metric: dict[str, str] | None = config_key(
        entries=ConfigKey(FOLDER), names_sets=True, default=None, resume=ECHO
    )
    max_depth: float | None = config_key(meters(example=20, optional=True), default=None, resume=ECHO)
    steps: int | None = config_key(integer(1, example=1000, optional=True), default=None, resume=ECHO)
    classes: dict[str, str] | None = config_key(
        entries=ConfigKey(FOLDER), names_sets=True, default=None, resume=ECHO
    )
    segmentation: SegmentationSourceConfig | None = config_key(
        section=SegmentationSourceConfig, default=None, resume=ECHO
    )


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
    sets: dict[str, str] = config_key(entries=ConfigKey(FOLDER), names_sets=True, resume=START)
    labels: str | None = config_key(
        OPTIONAL_FOLDER, stages=(*LABEL_STAGES, "segmentation", "controlnet"), resume=ECHO
    )
    seed: int = config_key(SEED, stages=FIT_STAGES, resume=ECHO, repeats_run=True)
    batch_size: int = config_key(integer(1, 10**6, example=16), resume=ECHO, repeats_run=True)
    streams: int = config_key(
        integer(1, 10**7, example=128), stages=FIT_STAGES, resume=ECHO, repeats_run=True
    )
    image_size: int = config_key(integer(1, 2**14, example=518), resume=ECHO, repeats_run=True)
    workers: int = config_key(integer(0, 1024, example=4), resume=FREE, repeats_run=True)
    labelled: dict[str, str] = config_key(
        entries=ConfigKey(FOLDER), names_sets=True, stages=("student",), resume=ECHO
    )
    mix: Any = config_key(SET_NAMES, stages=("student",), resume=ECHO, repeats_run=True)
    sky: Any = config_key(SKY, stages=(*DEPTH_STAGES, "controlnet"), resume=ECHO)
    perturb: bool = config_key(
        flag(), stages=(*DEPTH_STAGES, "segmentation", "controlnet"), resume=ECHO, repeats_run=True
    )
    cutmix: bool = config_key(flag(), stages=("student",), resume=ECHO, repeats_run=True)
    label_weight: str = config_key(
        choice(*LABEL_WEIGHTS), default="none", stages=("student",), resume=ECHO, repeats_run=True
    )
    label_threshold: float = config_key(
        CONFIDENCE, default=0.5, stages=("student",), resume=ECHO, repeats_run=True
    )
    crop_share: float = config_key(SHARE, default=0.0, stages=("student",), resume=ECHO, repeats_run=True)
    local_weight: float = config_key(LOSS_WEIGHT, default=0.0, stages=("student",), resume=ECHO)
    repeat: dict[str, int] | None = config_key(REPEAT, stages=FIT_STAGES)
    images: dict[str, str] = config_key(
        entries=ConfigKey(FOLDER), names_sets=True, stages=("metric",), resume=ECHO
    )
    replay: Any = config_key(SET_NAMES, stages=("metric",), resume=ECHO, repeats_run=True)
    replay_share: float = config_key(OPEN_FRACTION, stages=("metric",), resume=ECHO, repeats_run=True)
    allow_partial: bool = config_key(
        flag(), stages=("student", "metric", "controlnet"), resume=FREE, repeats_run=True
    )
    min_depth: float = config_key(ANY, stages=("metric",), resume=ECHO, repeats_run=True)
    max_depth: float = config_key(ANY, stages=("metric",), resume=ECHO, repeats_run=True)
    canonical_focal: float | None = config_key(
        ANY, default=None, stages=("metric",), resume=ECHO, repeats_run=True
    )
    run_dir: str = config_key(FOLDER, stages=FIT_STAGES, resume=FREE, repeats_run=True)
    short_side: int | None = config_key(
        integer(1, 2**14, example=896, optional=True), stages=("segmentation",), resume=ECHO, repeats_run=True
    )
    scale_jitter: Any = config_key(SCALE_RANGE, stages=("segmentation",), resume=ECHO, repeats_run=True)
    precision: str = config_key(ANY, stages=("pseudolabel",), resume=ECHO)
    codec: str = config_key(choice("q12", "f32"), stages=("pseudolabel",))
    share: str | None = config_key(
        SHARE_OF_WORK, default=None, stages=("pseudolabel",), resume=FREE, repeats_run=True
    )
    captions: bool = config_key(flag(), default=False, stages=("controlnet",), resume=ECHO)
    flip: bool = config_key(flag(), default=True, stages=("controlnet",), resume=CHANGE)


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

    name: str = config_key(RUN_NAME, resume=FREE)
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
    stage_to: str | None = config_key(NODE_FOLDER, default=None, resume=FREE)
    hang_timeout: float | None = config_key(
        real(0, above=True, example=300, optional=True), default=None, resume=FREE
    )
    checkpoint: CheckpointConfig = config_key(section=CheckpointConfig, resume=FREE)
    mirror: MirrorConfig = config_key(section=MirrorConfig, default=MirrorConfig(), resume=FREE)
    logging: LoggingConfig = config_key(section=LoggingConfig, resume=FREE)
    guards: GuardsConfig = config_key(section=GuardsConfig, default=GuardsConfig(), resume=FREE)
    validation: ValidationConfig = config_key(section=ValidationConfig, resume=FREE)
    stage: str = config_key(text("a stage", example="teacher"))
    size: str = config_key(text("a size", example="tiny"), resume=START)
    encoder: str = config_key(text("an encoder", example="vits"), stages=ENCODER_STAGES)
    base: str | None = config_key(
        text(
            "a diffusers folder or a hub name",
            example="stable-diffusion-v1-5/stable-diffusion-v1-5",
            optional=True,
        ),
        default=None,
        stages=("controlnet",),
    )
    batch_size: int = config_key(integer(1, 10**6, example=16))
    steps: int = config_key(integer(1, 10**9, example=1000), stages=FIT_STAGES, resume=CHANGE)
    image_size: int = config_key(integer(1, 2**14, example=518))
    perturb: bool = config_key(flag(), default=False, stages=(*DEPTH_STAGES, "segmentation"), resume=CHANGE)
    sky: Any = config_key(SKY, default=None, stages=("teacher", "student"))
    mix: Any = config_key(SET_NAMES, default=None, stages=("student",))
    cutmix: bool = config_key(flag(), default=False, stages=("student",), resume=CHANGE)
    label_weight: str = config_key(choice(*LABEL_WEIGHTS), default="none", stages=("student",), resume=CHANGE)
    label_threshold: float = config_key(CONFIDENCE, default=0.5, stages=("student",), resume=CHANGE)
    crop_share: float = config_key(SHARE, default=0.0, stages=("student",), resume=CHANGE)
    labels: str | None = config_key(
        OPTIONAL_FOLDER,
        stages=("student", "metric", "pseudolabel", "controlnet"),
        resume=START,
        replay_only=True,
    )
    teacher: Any = config_key(TEACHER, stages=("pseudolabel",), resume=START)
    teacher_rule: str = config_key(
        choice(*TEACHER_RULES), default="first", stages=("pseudolabel",), resume=START
    )
    teacher_shares: Any = config_key(SHARES, default=None, stages=("pseudolabel",), resume=START)
    agreement_tolerance: float = config_key(
        real(0, above=True, example=0.5), default=0.5, stages=("pseudolabel",), resume=START
    )
    label_confidence: bool = config_key(flag(), default=False, stages=("pseudolabel",), resume=START)
    label_crops: int = config_key(integer(0, 64, example=2), default=0, stages=("pseudolabel",), resume=START)
    label_crop_scale: float = config_key(
        real(0, 1, above=True, example=0.5), default=0.5, stages=("pseudolabel",), resume=START
    )
    teacher_quantity: str | None = config_key(
        choice("disparity", "depth", optional=True), default=None, stages=("pseudolabel",), resume=START
    )
    teacher_unit: str | None = config_key(
        choice("m", "1/m", "relative", optional=True), default=None, stages=("pseudolabel",), resume=START
    )
    teacher_licence: str | None = config_key(
        text("the SPDX name of a license", example="CC-BY-NC-4.0", optional=True),
        default=None,
        stages=("pseudolabel",),
        resume=FREE,
    )
    share: str | None = config_key(SHARE_OF_WORK, default=None, stages=("pseudolabel",), resume=FREE)
    start: str | None = config_key(choice("encoder", "all"), stages=("metric",), resume=START)
    freeze_encoder: bool = config_key(flag(), default=False, stages=("metric", "segmentation"))
    head: str = config_key(choice("linear", "dpt", "mask2former", "eomt"), stages=("segmentation",))
    head_options: dict[str, Any] | None = config_key(
        entries=ConfigKey(ANY), default=None, stages=("segmentation",)
    )
    short_side: int | None = config_key(
        integer(1, 2**14, example=896, optional=True), default=None, stages=("segmentation",)
    )
    scale_jitter: Any = config_key(SCALE_RANGE, default=(1.0, 1.0), stages=("segmentation",), resume=CHANGE)
    window_stride: int | None = config_key(
        integer(1, 2**14, example=426, optional=True), default=None, stages=("segmentation",), resume=FREE
    )
    lora: int | None = config_key(integer(1, optional=True, example=8), default=None, stages=("metric",))
    max_depth: float | None = config_key(meters(example=20), stages=("metric",))
    min_depth: float | None = config_key(meters(example=0.001), stages=("metric",))
    canonical_focal: float | None = config_key(FOCAL, default=None, stages=("metric",))
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

    @property
    def teachers(self) -> list[str]:
        """The teachers of stage=pseudolabel as they were typed; one unless `teacher` is a list."""
        return [str(each) for each in self.teacher] if isinstance(self.teacher, list) else [str(self.teacher)]
