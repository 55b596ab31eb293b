"""The networks of a run: starting weights, teacher, frozen encoder, and the provenance saved with the result."""

import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from depth_anything.data.reader import JoinedRecords, Records
from depth_anything.errors import PSEUDOLABEL_COMMAND, ArgumentWarning, UserError, format_error
from depth_anything.licenses import combine_licenses
from depth_anything.model.card import build_card, build_encoder_card, write_card
from depth_anything.model.depth_anything import DepthAnything, HeadBuilder, head_name
from depth_anything.model.encoder import hub_license, hub_repository
from depth_anything.model.lora import add_adapters
from depth_anything.model.masked_autoencoder import MaskedAutoencoder, save_encoder
from depth_anything.model.official_weights import name_hints
from depth_anything.model.scratch_init import init_from_scratch
from depth_anything.model.weights import (
    fingerprint,
    has_head,
    load_encoder,
    load_model,
    read_head_name,
    read_license,
    save_model,
)
from depth_anything.training.check_config import build_head
from depth_anything.training.config import RunConfig
from depth_anything.training.resume import read_config

Network = TypeVar("Network", bound=DepthAnything | MaskedAutoencoder)


def build_model(config: RunConfig) -> DepthAnything | MaskedAutoencoder:
    """Build the network of a run with its starting weights: a depth network, or of stage=pretrain an autoencoder.

    Raises:
        UserError: As `build_depth_model`; or if `init` of stage=pretrain has another encoder.
    """
    if config.stage != "pretrain":
        return build_depth_model(config)
    model = build_random_autoencoder(config)
    if config.init == "scratch":
        init_from_scratch(model)
    elif config.init is not None:
        _load_encoder(model, config)
    return model


def build_random_autoencoder(config: RunConfig) -> MaskedAutoencoder:
    """Build the encoder and decoder of stage=pretrain with random weights, drawn from `seed`."""
    torch.manual_seed(config.seed)
    recipe = config.recipe
    model = MaskedAutoencoder(
        config.encoder, width=recipe.decoder_width, depth=recipe.decoder_depth, heads=recipe.decoder_heads
    )
    model.input_size = config.image_size
    return model


def build_depth_model(config: RunConfig) -> DepthAnything:
    """Build the depth network of a run with its starting weights.

    `init` is "hub" (DINOv2 through timm), a DINOv2 file, a model of this project or of the authors, null for random
    weights by DINOv2's rule, drawn from `seed`, or "scratch" for random weights that suit short runs. stage=metric
    predicts meters up to `max_depth`; `start` says which weights of a whole model it copies, `freeze_encoder` freezes
    the encoder, `lora` trains adapters in place of its weights.
    `model.head` names another decoder; of a model with another head than that, only the encoder is copied.

    Raises:
        UserError: If the file is missing or of another size or kind, or a student would start from a teacher.
    """
    _reject_teacher_weights(config)
    source, file, start = config.init, _weights_file(config), config.start or "all"
    if config.stage == "metric" and file is not None and not file.exists():
        raise UserError(
            f"there is no model at {source}",
            f"run `python train.py stage=student size={config.size}` first, type init=FILE for another relative "
            "model, or init=hub for DINOv2's encoder",
        )
    head, other = build_head(config), None
    if file is not None and has_head(file) and read_head_name(file) == head_name(head):
        other = _load_model_for_run(file, encoder=config.encoder, head=head)
    torch.manual_seed(config.seed)
    taps = other.taps if other is not None and start == "all" else None
    model = DepthAnything(config.encoder, max_depth=config.max_depth, taps=taps, head=head)
    model.input_size = config.image_size  # saved in the model file
    if source is None:
        pass
    elif source == "scratch":
        init_from_scratch(model)
    elif other is not None:
        _copy_weights(model, other, start)
        _print_depth_scale_notes(config, model, other)
        base = other.origin.get("start", {}).get("base")
        model.origin = {"start": {"from": _short_path(source), "licence": other.licence, "base": base}}
    else:
        _load_encoder(model, config)
    if config.freeze_encoder:
        model.pretrained.requires_grad_(False)
    if config.lora:
        add_adapters(model, config.lora)
    return model


def _load_encoder(model: DepthAnything | MaskedAutoencoder, config: RunConfig) -> None:
    """Load the encoder that `init` names, and record where it comes from."""
    source = config.init
    assert source is not None
    load_encoder(model, source)
    named = hub_repository(config.encoder) if source == "hub" else None
    licence = hub_license(config.encoder) if named else read_license(source)
    model.origin = {"start": {"from": named or _short_path(source), "licence": licence, "base": named}}


def check_initial_weights(config: RunConfig) -> None:
    """Check the starting weights of a run if their file exists; nothing is downloaded.

    Raises:
        UserError: As `build_model` and `build_frozen_encoder`.
    """
    _reject_teacher_weights(config)
    _check_alignment_weights(config)
    file = _weights_file(config)
    if file is None or not file.exists():
        return
    head = build_head(config)
    if config.stage != "pretrain" and has_head(file) and read_head_name(file) == head_name(head):
        load_model(file, encoder=config.encoder, head=head)
    else:
        load_encoder(DepthAnything(config.encoder), file)


def _weights_file(config: RunConfig) -> Path | None:
    """Return the file or folder that `init` names; None for the hub and for random weights."""
    return None if config.init in (None, "hub", "scratch") else Path(config.init)  # type: ignore[arg-type]


def _reject_teacher_weights(config: RunConfig) -> None:
    source = config.init
    if config.stage == "student" and source is not None and _is_teacher(Path(source)):
        raise UserError(
            f"init={source} is a teacher, but a student starts from DINOv2 of its size",
            "type init=hub or init=DINOV2_FILE",
        )


def _check_alignment_weights(config: RunConfig) -> None:
    source = config.init
    if not config.recipe.alignment_weight:
        return
    file = _weights_file(config)
    if source in (None, "scratch") or (file is not None and file.exists() and has_head(file)):
        raise UserError(
            f"feature alignment needs DINOv2's weights, and init={source or 'null'} is not DINOv2",
            "type init=hub, init=DINOV2_FILE or recipe.alignment_weight=0",
        )


def _print_depth_scale_notes(config: RunConfig, model: DepthAnything, other: DepthAnything) -> None:
    """Print what happens to the meters of the starting weights: a calibration is lost, another range scales them."""
    if other.calibration is not None:
        print(
            f"note: init={config.init} is calibrated; training invalidates that, so calibrate the new model",
            file=sys.stderr,
        )
    ranges = (other.max_depth, model.max_depth)
    if None not in ranges and ranges[0] != ranges[1] and (config.start or "all") == "all":
        print(
            f"note: init={config.init} predicts depth up to {ranges[0]:g} m; with max_depth={ranges[1]:g} its "
            "predictions are scaled until training has corrected them",
            file=sys.stderr,
        )


def _copy_weights(model: DepthAnything, other: DepthAnything, start: str) -> None:
    """Copy the encoder's weights, or with start="all" also the head's.

    The last convolution is copied only between models of the same quantity: a disparity is larger where a depth is
    smaller, and is followed by a ReLU instead of a sigmoid.
    """
    skipped: tuple[str, ...] = ("depth_head.",) if start == "encoder" else ()
    if model.quantity != other.quantity:
        skipped += ("depth_head.scratch.output_conv2.2.",)
    state = {name: tensor for name, tensor in other.state_dict().items() if not name.startswith(skipped)}
    model.load_state_dict(state, strict=False)


def add_provenance(model: Network, config: RunConfig, sources: Sequence[Records | JoinedRecords]) -> Network:
    """Store in a network what it is trained on, and the combined license of its data, teachers and starting weights.

    Raises:
        UserError: If labels of a metric teacher were written by a version that did not convert them to disparity.
    """
    for source in sources:
        if isinstance(source, JoinedRecords):
            _reject_metric_labels(source)
    data = [_set_provenance(source) for source in sources]
    start = model.origin.get("start")
    licences = [start["licence"]] if start else []
    for row in data:
        licences += [row["licence"], *([row["teacher"]["licence"]] if row["teacher"] else [])]
    model.licence = combine_licenses(licences)
    model.origin = {**model.origin, "stage": config.stage, "data": data}
    if config.lora:
        model.origin["lora"] = config.lora
    return model


def write_result(
    model: DepthAnything | MaskedAutoencoder, path: Path, *, title: str, measured: Mapping[str, str]
) -> None:
    """Write the model of a finished run and its card; of stage=pretrain the encoder alone.

    Args:
        model: The trained network.
        path: model.safetensors in the folder of the run.
        title: Name of the run.
        measured: Metric name to its value at the last validation.
    """
    if isinstance(model, MaskedAutoencoder):
        save_encoder(model, path)
        text = build_encoder_card(model, file=path.name, title=title)
        write_card(text, path.parent, file=path.name)
        return
    save_model(model, path)
    write_run_card(model, path.parent, title=title, measured=measured)


def write_run_card(model: DepthAnything, folder: Path, *, title: str, measured: Mapping[str, str]) -> None:
    """Write the model card of a run into its folder, unless a user has edited the card that is there.

    Args:
        model: The model as it is saved.
        folder: Folder of the run.
        title: Name of the run.
        measured: Metric name to its value at the last validation.
    """
    rows = [f"| {name} | {float(value):.4g} |" for name, value in measured.items()]
    table = "\n".join(
        [
            "Results of the run's last validation; its config.yaml names the images:",
            "",
            "| metric | mean |",
            "|---|---|",
            *rows,
        ]
    )
    text = build_card(
        model,
        file="model.safetensors",
        form="safetensors",
        title=title,
        measured={"Evaluation": table} if rows else {},
    )
    write_card(text, folder, file="model.safetensors")


def _set_provenance(source: Records | JoinedRecords) -> dict[str, Any]:
    if isinstance(source, Records):
        licence = source.set.meta.get("licence")
        return {"set": source.name, "records": source.set.records, "licence": licence, "teacher": None}
    teacher = source.labels.meta["teacher"]
    return {
        "set": source.name,
        "records": source.labels.records,
        "licence": source.images.meta.get("licence"),
        "teacher": {"file": _short_path(teacher.get("file", "a model")), "licence": teacher.get("licence")},
    }


def _reject_metric_labels(source: JoinedRecords) -> None:
    """Refuse labels that hold depth in place of disparity, as older versions wrote them for a metric teacher.

    Label sets of this version record the quantity of their teacher. For older ones the teacher's file is loaded, if it
    still exists and has the same fingerprint.

    Raises:
        UserError: Naming the label set and its teacher.
    """
    teacher = source.labels.meta["teacher"]
    if "quantity" in teacher:
        return
    file = str(teacher.get("file", ""))
    if not Path(file).exists():
        metric = name_hints(Path(file)).get("max_depth") is not None
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were printed when it labeled
            try:
                model = load_model(file)
            except ValueError:
                return  # the file was replaced
        metric = model.quantity == "depth" and fingerprint(model) == teacher["fingerprint"]
    if metric:
        raise UserError(
            f"the labels in {source.labels.root} hold the depth of {file} in meters instead of disparity (an older "
            "version did not convert it)",
            [
                "remove that folder and label again with `",
                PSEUDOLABEL_COMMAND,
                "`, or type labels=FOLDER for others",
            ],
        )


def _short_path(path: str | Path) -> str:
    """Return the name of a file, with its folder if the name alone is generic."""
    path = Path(path)
    return "/".join(path.parts[-2:]) if path.stem in ("model", "best", "last") else path.name


def crop_multiple(config: RunConfig) -> int:
    """Return the number of pixels that the sides of training crops must be multiples of.

    Of stage=pretrain that is the encoder's patch, which its data module masks.
    """
    if config.stage != "pretrain":
        return image_size_multiple(config.encoder)
    with torch.device("meta"):
        return DepthAnything(config.encoder).patch_size


def image_size_multiple(encoder: str) -> int:
    """Return the number of pixels that image sides must be multiples of, without allocating weights."""
    with torch.device("meta"):
        return DepthAnything(encoder).multiple


def build_frozen_encoder(config: RunConfig) -> DepthAnything | None:
    """Build the frozen DINOv2 that a student's features are aligned with; None without feature alignment.

    Raises:
        UserError: If `init` is not DINOv2.
    """
    if not config.recipe.alignment_weight:
        return None
    _check_alignment_weights(config)
    frozen = DepthAnything(config.encoder)
    assert config.init is not None  # _check_alignment_weights refuses it
    load_encoder(frozen, config.init)
    return frozen


def load_teacher(config: RunConfig) -> DepthAnything:
    """Load the network that labels.

    Raises:
        UserError: If the file that `teacher` names does not exist or cannot be read.
    """
    path = Path(config.teacher)
    if not path.exists():
        raise UserError(
            f"there is no teacher at {path}",
            f"run `python train.py stage=teacher size={config.size}` first, or type teacher=FILE",
        )
    teacher = _load_model_for_run(path, encoder=config.encoder, head=build_head(config))
    size = config.image_size
    if size != teacher.input_size:
        warnings.warn(
            f"teacher={path} was trained on images of {teacher.input_size} px, but labels at image_size={size}; "
            f"type image_size={teacher.input_size} unless this is intended",
            stacklevel=2,
        )
    return teacher


def _load_model_for_run(path: Path, *, encoder: str, head: HeadBuilder | None) -> DepthAnything:
    """Load a model; errors and warnings name config keys and commands in place of arguments of `load_model`."""
    file = shlex.quote(str(path)).replace("{", "{{").replace("}", "}}")
    export = f"depth-anything export --to safetensors --weights {file} --output NEW.safetensors"
    typed = {
        "encoder": "encoder={}",
        "head": "+model.head._target_={}",
        "version": f"the file that is made by  {export} --weights-version {{}}",
        "max_depth": f"the file that is made by  {export} --max-depth {{}}",
    }
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ArgumentWarning)
            model = load_model(path, encoder=encoder, head=head)
    except UserError as error:
        raise UserError(format_error(error, flags=typed)) from error
    for warning in caught:
        warnings.warn(format_error(warning.message, flags=typed), warning.category, stacklevel=3)
    return model


def _is_teacher(path: Path) -> bool:
    """Return whether a path is the folder of a teacher's run, its model, or one of its checkpoints."""
    for folder in (path, *path.parents[:2]):
        config = folder / "config.yaml"
        if path.exists() and config.is_file():
            with suppress(ValueError):  # the config.yaml of another program
                return read_config(config)["stage"] == "teacher"
    return False
