"""The keys of a run: type, range and stages of each, and whether it may change when a run is resumed.

The dataclasses below are the schema of the composed config (configs/*.yaml). check_config.py validates against it,
resume.py compares two configs by it, and command.py suggests keys from it.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

FIT_STAGES = ("teacher", "student", "metric")
STAGES = (*FIT_STAGES, "pseudolabel")
SCHEDULES = ("constant", "linear", "cosine", "poly", "late-cosine")

FREE = "free"
"""May differ at every start: where a run computes, what it prints, when it saves."""
CHANGE = "change"
"""May be changed on purpose: in a run's own folder with resume_with=, and with resume=OTHER."""
SAME = "same"
"""Never changes in a run, nor between a checkpoint and the run that goes on from it."""
START = "start"
"""Never changes in a run; does not matter to a run that goes on from another run's checkpoint."""
ECHO = "echo"
"""Repeats another key."""


@dataclass(frozen=True)
class ValueRule:
    """What a value must be."""

    accepts: Callable[[Any], bool]
    text: str  # "a whole number above 0"
    example: Any  # a value that is accepted, as it is typed
    options: tuple[str, ...] = ()  # of a choice


@dataclass(frozen=True)
class ConfigKey:
    """What the schema says of one key.

    Attributes:
        rule: Of its value; None for a section, whose fields have rules of their own.
        stages: That know the key.
        resume: FREE, CHANGE, SAME, START or ECHO.
        section: Dataclass of the keys below it.
        entries: Of the values of a mapping whose names are the user's.
        names: That such a mapping may have; () is any.
        open: More keys are allowed where `_target_` of the section takes them.
        replay_only: In stage=metric, nothing reads the key without replay.
    """

    rule: ValueRule | None = None
    stages: tuple[str, ...] = STAGES
    resume: str = SAME
    section: type | None = None
    entries: "ConfigKey | None" = None
    names: tuple[str, ...] = ()
    open: bool = False
    replay_only: bool = False


def config_key(rule: ValueRule | None, *, default: Any = MISSING, **settings: Any) -> Any:
    """Declare a field of the schema; a key with a default may be absent from a config."""
    return field(default=default, metadata={"key": ConfigKey(rule, **settings)})


def keys_of(section: type) -> dict[str, ConfigKey]:
    """Return the keys of a dataclass of the schema by name."""
    items: dict[str, Any] = vars(section)["__dataclass_fields__"]
    return {"_target_" if name == "target" else name: item.metadata["key"] for name, item in items.items()}


def default_value(section: type, name: str) -> Any:
    """Return what the absence of a key means; MISSING where it must be in every config whose stage knows it."""
    item = vars(section)["__dataclass_fields__"].get("target" if name == "_target_" else name)
    return MISSING if item is None else item.default


def integer(low: int, high: int | None = None, *, example: int, optional: bool = False) -> ValueRule:
    """Accept whole numbers from `low` to `high`; true and false are no numbers."""

    def accepts(value: Any) -> bool:
        if value is None:
            return optional
        return type(value) is int and low <= value and (high is None or value <= high)

    above = {0: "from 0 up", 1: "above 0"}.get(low, f"from {low} up")
    text = f"a whole number {above if high is None else f'from {low} to {high}'}"
    return ValueRule(accepts, text + (", or null" if optional else ""), example)


def real(
    low: float,
    high: float = math.inf,
    *,
    example: float,
    above: bool = False,
    below: bool = False,
    unit: str = "",
    optional: bool = False,
) -> ValueRule:
    """Accept finite numbers from `low` (or above it) to `high` (or below it)."""

    def accepts(value: Any) -> bool:
        if value is None:
            return optional
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return (low < value if above else low <= value) and (value < high if below else value <= high)

    if high == math.inf:
        span = f"above {low:g}" if above else f"from {low:g} up"
    elif above and below:
        span = f"between {low:g} and {high:g}"
    else:
        span = f"{'above' if above else 'from'} {low:g} {'and below' if below else 'to'} {high:g}"
    text = f"a number {unit and unit + ' '}{span}"
    return ValueRule(accepts, text + (", or null" if optional else ""), example)


def flag() -> ValueRule:
    """Accept true and false."""
    return ValueRule(lambda value: type(value) is bool, "true or false", True)


def choice(*options: str, optional: bool = False) -> ValueRule:
    """Accept one of some words."""
    text = f"{', '.join(options[:-1])} or {options[-1]}" if len(options) > 1 else options[0]
    return ValueRule(
        lambda value: (value is None and optional) or (isinstance(value, str) and value in options),
        text + (", or null" if optional else ""),
        options[0],
        options,
    )


def text(what: str, *, example: str, optional: bool = False) -> ValueRule:
    """Accept words that are not empty; a number is taken for its digits."""

    def accepts(value: Any) -> bool:
        if value is None:
            return optional
        return type(value) in (str, int, float) and str(value).strip() != ""

    return ValueRule(accepts, what + (", or null" if optional else ""), example)


def _is_betas(value: Any) -> bool:
    one = real(0, 1, below=True, example=0.9)
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(one.accepts, value))


def _is_set_names(value: Any) -> bool:
    if value is None or isinstance(value, (bool, str)):
        return value != ""
    return isinstance(value, Sequence) and all(isinstance(name, str) and name for name in value)


def _is_sky(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and policy in ("far", "invalid") for name, policy in value.items())
    return value in (None, "far", "invalid")


def _is_repeat(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and type(n) is int and n >= 1 for name, n in value.items())
    return value is None


def _is_devices(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and len(set(value)) == len(value) and all(type(n) is int and n >= 0 for n in value)
    if isinstance(value, str):
        return value == "auto" or all(part.strip().isdecimal() for part in value.split(","))
    return type(value) is int and (value >= 1 or value == -1)


BETAS = ValueRule(_is_betas, "two numbers from 0 and below 1", [0.9, 0.999])
SET_NAMES = ValueRule(_is_set_names, "true, null, or names of sets", True)
SKY = ValueRule(_is_sky, "far, invalid, null, or {SET: far or invalid}", "invalid")
REPEAT = ValueRule(_is_repeat, "null or {SET: a whole number above 0}", None)
DEVICES = ValueRule(_is_devices, "auto, -1 for all, a whole number above 0, or a list of device numbers", 1)
STRATEGY = ValueRule(
    lambda value: isinstance(value, (str, Mapping)) and bool(value), "a strategy of Lightning's", "auto"
)
ANY = ValueRule(lambda value: True, "any value", None)
FOLDER = text("a folder", example="FOLDER")
FILE = text("a file", example="FILE", optional=True)
LEARNING_RATE = real(0, 1, example=5e-5)
WEIGHT = real(0, example=1.0)
FRACTION = real(0, 1, below=True, example=0.1)
SEED = integer(0, 2**64 - 1, example=0)
CLASS_PATH = text("the name of a class, as package.module.Class", example="my_stage.MyStage")
KEY_NAMES = ValueRule(
    lambda value: (
        value is None or isinstance(value, str) or (_is_set_names(value) and not isinstance(value, bool))
    ),
    "the names of the keys that change, as [recipe.head_lr,steps]",
    ["recipe.head_lr"],
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The numbers of a training recipe; configs/stage/*.yaml hold the paper's, docs/recipe.md the reasons.

    Attributes:
        steps: Optimizer steps of the whole run; the schedule ends there.
        encoder_lr: Adam's rate for the encoder.
        head_lr: Adam's rate for the DPT head.
        betas: Adam's.
        weight_decay: Decoupled; 0 is plain Adam, as the paper has it.
        schedule: "constant", "linear", "cosine", "poly" or "late-cosine".
        warmup: Share of the run over which the rate climbs.
        clip_norm: Largest global gradient norm; None leaves gradients alone.
        ssi_weight: Weight of the scale-and-shift-invariant loss.
        gm_weight: Weight of the gradient-matching loss.
        gm_scales: Its strided scales.
        trim: Share of the largest residuals of each image left out of ssi.
        gm_trim: The same for gradient matching.
        alignment_weight: Weight of the feature-alignment term (student); 0 leaves it out.
        alignment_tolerance: Cosine above which a token is near enough.
        checkpointing: Recompute encoder blocks in the backward pass.
        compile: Compile encoder blocks in place.
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
    ssi_weight: float = config_key(WEIGHT, default=1.0, resume=CHANGE, replay_only=True)
    gm_weight: float = config_key(WEIGHT, default=2.0, resume=CHANGE, replay_only=True)
    gm_scales: int = config_key(integer(1, 10, example=4), default=4, resume=CHANGE, replay_only=True)
    trim: float = config_key(FRACTION, default=0.0, resume=CHANGE, replay_only=True)
    gm_trim: float = config_key(FRACTION, default=0.0, resume=CHANGE, replay_only=True)
    alignment_weight: float = config_key(WEIGHT, default=0.0, stages=("student",), resume=CHANGE)
    alignment_tolerance: float = config_key(
        real(-1, 1, example=0.85), default=0.85, stages=("student",), resume=CHANGE
    )
    checkpointing: bool = config_key(flag(), default=False, resume=CHANGE)
    compile: bool = config_key(flag(), default=False, resume=CHANGE)

    def __post_init__(self) -> None:
        """Refuse numbers out of range before anything is built.

        Raises:
            ValueError: Naming the key and what it must be.
        """
        for name, known in keys_of(type(self)).items():
            if known.rule is not None:
                check_value(f"recipe.{name}", getattr(self, name), known.rule)


@dataclass(frozen=True, kw_only=True)
class MetricRecipe(Recipe):
    """The numbers of a metric recipe: those of any fitting stage, and SILog's; the invariant losses are replay's.

    Attributes:
        silog_weight: Weight of the loss. Adam does not mind it; clipping by `clip_norm` does.
        variance_focus: 1 forgives a wrong scale altogether, 0 not at all.
    """

    silog_weight: float = config_key(WEIGHT, default=1.0, stages=("metric",), resume=CHANGE)
    variance_focus: float = config_key(
        real(0, 1, example=0.5), default=0.5, stages=("metric",), resume=CHANGE
    )


@dataclass(frozen=True, kw_only=True)
class RecipeConfig(MetricRecipe):
    """The recipe of a config: the numbers of any stage's, and the class that holds them."""

    target: str = config_key(CLASS_PATH, resume=START)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, in optimizer steps, and how many stay."""

    every: int = config_key(integer(1, example=2000))
    keep: int = config_key(integer(1, example=2))


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """When numbers are logged, in optimizer steps."""

    every: int = config_key(integer(1, example=50))


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """On what a run is validated, and when."""

    every: int = config_key(integer(1, example=5000))
    limit: int = config_key(integer(1, example=256))
    benchmark: str | None = config_key(text("a benchmark", example="nyu", optional=True), default=None)
    root: str | None = config_key(text("a folder", example="FOLDER", optional=True), default=None)
    protocol: str | None = config_key(text("a protocol", example="da2", optional=True), default=None)
    max_depth: float | None = config_key(
        real(0, above=True, unit="of metres", example=20, optional=True), default=None
    )


@dataclass(frozen=True, kw_only=True)
class SceneSetConfig:
    """A procedural set that is written on first use."""

    root: str = config_key(FOLDER)
    look: str = config_key(choice("synthetic", "photographic"))
    count: int = config_key(integer(1, 10_000_000, example=768))
    seed: int = config_key(integer(0, example=1))
    height: int = config_key(integer(14, example=112))
    width: int = config_key(integer(14, example=144))
    labelled: bool = config_key(flag(), default=True)
    per_shard: int = config_key(integer(1, example=128), default=128)


@dataclass(frozen=True, kw_only=True)
class SourcesConfig:
    """Where sets lie: {name: folder, URL or command}."""

    labelled: dict[str, str] = config_key(None, entries=ConfigKey(FOLDER), resume=START)
    images: dict[str, str] = config_key(None, entries=ConfigKey(FOLDER), resume=START)
    validation: str | None = config_key(text("a folder", example="FOLDER", optional=True), resume=FREE)
    scenes: dict[str, SceneSetConfig] = config_key(
        None, entries=ConfigKey(section=SceneSetConfig), resume=START
    )


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Lightning's Trainer; its other arguments are added as +trainer.NAME=VALUE."""

    target: str = config_key(CLASS_PATH, resume=START)
    accelerator: str = config_key(text("an accelerator of Lightning's", example="auto"), resume=FREE)
    devices: Any = config_key(DEVICES, resume=FREE)
    num_nodes: int = config_key(integer(1, example=1), resume=FREE)
    strategy: Any = config_key(STRATEGY, resume=FREE)
    precision: Any = config_key(
        ValueRule(lambda value: type(value) in (str, int), "a precision of Lightning's", "auto"),
        resume=CHANGE,
    )


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """A logger beside metrics.csv; its arguments are those of its class."""

    target: str = config_key(CLASS_PATH, default=None)


@dataclass(frozen=True, kw_only=True)
class ModuleConfig:
    """The LightningModule of the stage; a user's own takes arguments of its own."""

    target: str = config_key(CLASS_PATH, resume=START)
    recipe: Any = config_key(ANY, default=None, stages=FIT_STAGES, resume=ECHO)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The arguments of the stage's DataModule, most of which repeat keys of the run."""

    target: str = config_key(CLASS_PATH, resume=START)
    sets: dict[str, str] = config_key(None, entries=ConfigKey(FOLDER), resume=START)
    labels: str | None = config_key(text("a folder", example="FOLDER", optional=True), resume=ECHO)
    seed: int = config_key(SEED, stages=FIT_STAGES, resume=ECHO)
    batch_size: int = config_key(integer(1, 10**6, example=16), resume=ECHO)
    streams: int = config_key(integer(1, 10**7, example=128), stages=FIT_STAGES, resume=ECHO)
    image_size: int = config_key(integer(1, 2**14, example=518), resume=ECHO)
    workers: int = config_key(integer(0, 1024, example=4), resume=FREE)
    labelled: dict[str, str] = config_key(None, entries=ConfigKey(FOLDER), stages=("student",), resume=ECHO)
    mix: Any = config_key(SET_NAMES, stages=("student",), resume=ECHO)
    sky: Any = config_key(SKY, stages=FIT_STAGES, resume=ECHO)
    perturb: bool = config_key(flag(), stages=FIT_STAGES, resume=ECHO)
    cutmix: bool = config_key(flag(), stages=("student",), resume=ECHO)
    repeat: dict[str, int] | None = config_key(REPEAT, stages=FIT_STAGES)
    images: dict[str, str] = config_key(None, entries=ConfigKey(FOLDER), stages=("metric",), resume=ECHO)
    replay: Any = config_key(SET_NAMES, stages=("metric",), resume=ECHO)
    replay_share: float = config_key(
        real(0, 1, above=True, below=True, example=0.1), stages=("metric",), resume=ECHO
    )
    allow_partial: bool = config_key(flag(), stages=("student", "metric"), resume=FREE)
    min_depth: float = config_key(ANY, stages=("metric",), resume=ECHO)
    max_depth: float = config_key(ANY, stages=("metric",), resume=ECHO)
    run_dir: str = config_key(FOLDER, stages=FIT_STAGES, resume=FREE)
    precision: str = config_key(ANY, stages=("pseudolabel",), resume=ECHO)
    codec: str = config_key(choice("q12", "f32"), stages=("pseudolabel",))


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """The numbers of size=tiny, by stage or encoder."""

    perturb: Any = config_key(None, entries=ConfigKey(flag()), names=STAGES, default=None)
    rate: Any = config_key(None, entries=ConfigKey(LEARNING_RATE), default=None)
    encoder: Any = config_key(
        None, entries=ConfigKey(text("an encoder", example="vitn")), names=STAGES, default=None
    )
    init: Any = config_key(None, entries=ConfigKey(FILE), names=STAGES, default=None)
    max_depth: Any = config_key(real(0, above=True, unit="of metres", example=80), default=None)
    steps: Any = config_key(
        None, entries=ConfigKey(entries=ConfigKey(integer(1, example=400))), names=FIT_STAGES, default=None
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run: every key of configs/train.yaml and of the groups below it."""

    name: str = config_key(text("the name of a run", example="second"), resume=FREE)
    output_dir: str = config_key(FOLDER, resume=FREE)
    run_dir: str = config_key(FOLDER, resume=FREE)
    data_dir: str = config_key(FOLDER, resume=START)
    photos: str = config_key(FOLDER, resume=START)
    seed: int = config_key(SEED)
    workers: int = config_key(integer(0, 1024, example=4), resume=FREE)
    micro_batch: int | None = config_key(integer(1, optional=True, example=4), resume=FREE)
    streams: int | None = config_key(integer(1, 10**7, optional=True, example=128), default=None)
    init: str | None = config_key(FILE, resume=START)
    resume: str | None = config_key(FILE, resume=FREE)
    resume_with: Any = config_key(KEY_NAMES, default=None, resume=FREE)
    overwrite: bool = config_key(flag(), resume=FREE)
    allow_partial: bool = config_key(flag(), resume=FREE)
    dry_run: bool = config_key(flag(), resume=FREE)
    checkpoint: CheckpointConfig = config_key(None, section=CheckpointConfig, resume=FREE)
    logging: LoggingConfig = config_key(None, section=LoggingConfig, resume=FREE)
    validation: ValidationConfig = config_key(None, section=ValidationConfig, resume=FREE)
    stage: str = config_key(text("a stage", example="teacher"))
    size: str = config_key(text("a size", example="tiny"), resume=START)
    encoder: str = config_key(text("an encoder", example="vits"))
    batch_size: int = config_key(integer(1, 10**6, example=16))
    steps: int = config_key(integer(1, 10**9, example=1000), stages=FIT_STAGES, resume=CHANGE)
    image_size: int = config_key(integer(1, 2**14, example=518))
    perturb: bool = config_key(flag(), default=False, stages=FIT_STAGES, resume=CHANGE)
    sky: Any = config_key(SKY, default=None, stages=("teacher", "student"))
    mix: Any = config_key(SET_NAMES, default=None, stages=("student",))
    cutmix: bool = config_key(flag(), default=False, stages=("student",), resume=CHANGE)
    labels: str | None = config_key(
        text("a folder", example="FOLDER", optional=True),
        stages=("student", "metric", "pseudolabel"),
        resume=START,
        replay_only=True,
    )
    teacher: str = config_key(text("a file", example="FILE"), stages=("pseudolabel",), resume=START)
    start: str = config_key(choice("encoder", "all"), stages=("metric",), resume=START)
    freeze_encoder: bool = config_key(flag(), default=False, stages=("metric",))
    lora: int | None = config_key(integer(1, optional=True, example=8), default=None, stages=("metric",))
    max_depth: float = config_key(real(0, above=True, unit="of metres", example=20), stages=("metric",))
    min_depth: float = config_key(real(0, above=True, unit="of metres", example=0.001), stages=("metric",))
    replay: Any = config_key(SET_NAMES, default=None, stages=("metric",))
    replay_share: float = config_key(
        real(0, 1, above=True, below=True, example=0.1), default=0.1, stages=("metric",), replay_only=True
    )
    rates: dict[Any, float] = config_key(
        None, entries=ConfigKey(LEARNING_RATE), default=None, stages=("metric",), resume=FREE
    )
    sources: SourcesConfig = config_key(None, section=SourcesConfig)
    recipe: RecipeConfig = config_key(None, section=RecipeConfig, stages=FIT_STAGES, open=True)
    module: ModuleConfig = config_key(None, section=ModuleConfig, open=True)
    data: DataConfig = config_key(None, section=DataConfig, open=True)
    trainer: TrainerConfig = config_key(None, section=TrainerConfig, open=True)
    logger: LoggerConfig | None = config_key(None, section=LoggerConfig, default=None, open=True, resume=FREE)
    tiny: TinyConfig | None = config_key(None, section=TinyConfig, default=None, resume=FREE)


def check_value(name: str, value: Any, rule: ValueRule) -> None:
    """Hold a value against the rule of its key.

    Raises:
        ValueError: Naming the key, its value, what it must be and a value that is accepted.
    """
    if rule.accepts(value):
        return
    if rule.options:
        near = difflib.get_close_matches(str(value), rule.options, 1, 0.5) or list(rule.options[:1])
        others = ", ".join(option for option in rule.options if option != near[0])
        raise ValueError(f"{name}={format_value(value)} is unknown; type {name}={near[0]} (or {others})")
    example = rule.example
    if isinstance(value, float) and value.is_integer() and rule.accepts(int(value)):
        example = int(value)  # steps=1e3
    raise ValueError(f"{name}={format_value(value)} must be {rule.text}; type {name}={format_value(example)}")


def format_value(value: Any) -> str:
    """Write a value as it is typed behind a key."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{format_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(format_value, value)) + "]"
    return str(value)
