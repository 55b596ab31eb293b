"""The networks of a run: starting weights, teacher, frozen encoder, and the provenance saved with the result."""

import shlex
import sys
import warnings
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from depth_anything.data.address import with_addresses
from depth_anything.data.local_copy import local_path
from depth_anything.errors import ArgumentWarning, UserError, format_error
from depth_anything.licenses import check_license
from depth_anything.model.depth_anything import DepthAnything, HeadBuilder, head_name
from depth_anything.model.encoder import hub_license, hub_repository
from depth_anything.model.lora import add_adapters
from depth_anything.model.masked_autoencoder import MaskedAutoencoder
from depth_anything.model.scratch_init import init_from_scratch
from depth_anything.model.weights import (
    has_head,
    load_encoder,
    load_model,
    read_head_name,
    read_license,
)
from depth_anything.teachers.crop_teacher import CropTeacher
from depth_anything.teachers.ensemble_teacher import EnsembleTeacher
from depth_anything.teachers.network_teacher import NetworkTeacher, network_facts
from depth_anything.teachers.open_teacher import (
    check_no_kind,
    open_teacher,
    teacher_kind,
)
from depth_anything.teachers.teacher import Teacher
from depth_anything.training.check_config import build_head
from depth_anything.training.config import RunConfig
from depth_anything.training.provenance import short_path
from depth_anything.training.resume import read_config
from depth_anything.training.segmentation_setup import build_segmentation_model, check_segmentation_weights


def build_model(config: RunConfig) -> Any:
    """Build the network of a run with its starting weights.

    Returns:
        A `DepthAnything`; in stage=pretrain a `MaskedAutoencoder`, in stage=segmentation a `SegmentationModel`.

    Raises:
        UserError: As `build_depth_model`; or if `init` of stage=pretrain has another encoder.
    """
    if config.stage == "segmentation":
        return build_segmentation_model(config)
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
    model.canonical_focal = config.canonical_focal
    if source is None:
        pass
    elif source == "scratch":
        init_from_scratch(model)
    elif other is not None:
        _copy_weights(model, other, start)
        _print_depth_scale_notes(config, model, other)
        base = other.origin.get("start", {}).get("base")
        model.origin = {"start": {"from": short_path(source), "licence": other.licence, "base": base}}
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
    model.origin = {"start": {"from": named or short_path(source), "licence": licence, "base": named}}


def check_initial_weights(config: RunConfig) -> None:
    """Check the starting weights of a run if their file exists; nothing is downloaded.

    Raises:
        UserError: As `build_model` and `build_frozen_encoder`.
    """
    if config.stage == "segmentation":
        return check_segmentation_weights(config)
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
    focals = (other.canonical_focal, model.canonical_focal)
    if other.max_depth is not None and focals[0] != focals[1] and (config.start or "all") == "all":
        cameras = [f"the camera of {focal:g} px" if focal else "no certain camera" for focal in focals]
        print(
            f"note: init={config.init} predicts the depth of {cameras[0]}, and canonical_focal asks for that of "
            f"{cameras[1]}; its predictions are wrong in scale until training has corrected them",
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


def crop_multiple(config: RunConfig) -> int:
    """Return the number of pixels that the sides of training crops must be multiples of.

    Of stage=pretrain that is the encoder's patch, which its data module masks.
    """
    if config.stage != "pretrain":
        return image_size_multiple(config.encoder)
    with torch.device("meta"):
        return DepthAnything(config.encoder).patch_size


@cache
def image_size_multiple(encoder: str) -> int:
    """Return the number of pixels that image sides must be multiples of, without allocating weights.

    It is remembered: building a network takes a tenth of a second even without weights, and a run asks twice.
    """
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


def open_run_teacher(config: RunConfig) -> Teacher:
    """Open the teacher of stage=pseudolabel, of any kind, or several as one; with `label_crops` it labels crops, too.

    Raises:
        UserError: If there is no such teacher, or it cannot be used.
    """
    specs = config.teachers
    if len(specs) == 1:
        teacher = _open_one_teacher(replace(config, teacher=specs[0]))
    else:
        teacher = EnsembleTeacher(
            [_open_member(config, spec) for spec in specs],
            rule=config.teacher_rule,
            shares=config.teacher_shares,
            confidence=config.label_confidence,
            tolerance=config.agreement_tolerance,
        )
    if not config.label_crops:
        return teacher
    return CropTeacher(
        teacher, count=config.label_crops, scale=config.label_crop_scale, image_size=config.image_size
    )


def _open_member(config: RunConfig, spec: str) -> Teacher:
    """Open one of several teachers; a quantity and unit are for those whose files do not say them."""
    plain: dict[str, Any] = (
        {}
        if teacher_kind(spec) in ("folder", "function")
        else {"teacher_quantity": None, "teacher_unit": None}
    )
    return _open_one_teacher(replace(config, teacher=spec, **plain), any_encoder=True)


def _open_one_teacher(config: RunConfig, *, any_encoder: bool = False) -> Teacher:
    typed = {"quantity": config.teacher_quantity, "unit": config.teacher_unit}
    if teacher_kind(config.teacher) != "network":
        multiple = image_size_multiple(config.encoder)
        licence = config.teacher_licence
        return open_teacher(config.teacher, multiple=multiple, licence=licence, **typed)
    check_no_kind(config.teacher, **typed)
    licence = None if config.teacher_licence is None else check_license(config.teacher_licence)
    network = load_teacher(config, any_encoder=any_encoder)
    return NetworkTeacher(network, network_facts(network, config.teacher, licence=licence))


def load_teacher(config: RunConfig, *, any_encoder: bool = False) -> DepthAnything:
    """Load the network that labels, from a file of this project or of the authors.

    With `any_encoder` its encoder is that of the file, in place of the config's.

    Raises:
        UserError: If the file that `teacher` names does not exist or cannot be read.
    """
    path = local_path(config.teacher)
    if not path.exists():
        raise UserError(
            f"there is no teacher at {path}",
            f"run `python train.py stage=teacher size={config.size}` first, or type teacher=FILE",
        )
    head = build_head(config)
    try:
        encoder = None if any_encoder else config.encoder
        teacher = _load_model_for_run(path, encoder=encoder, head=head)
    except ValueError as error:  # `encoder` has a default, and weights of another size say which they are
        if any_encoder:
            raise
        try:
            teacher = _load_model_for_run(path, encoder=None, head=head)
        except ValueError:
            raise error from error.__cause__
        print(f"note: teacher={path} is a {teacher.encoder}, not encoder={config.encoder}", file=sys.stderr)
    size = config.image_size
    if size != teacher.input_size:
        warnings.warn(
            f"teacher={path} was trained on images of {teacher.input_size} px, but labels at image_size={size}; "
            f"type image_size={teacher.input_size} unless this is intended",
            stacklevel=2,
        )
    return teacher


def _load_model_for_run(path: Path, *, encoder: str | None, head: HeadBuilder | None) -> DepthAnything:
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
        text = with_addresses(format_error(warning.message, flags=typed))
        warnings.warn(text, warning.category, stacklevel=3)
    return model


def _is_teacher(path: Path) -> bool:
    """Return whether a path is the folder of a teacher's run, its model, or one of its checkpoints."""
    for folder in (path, *path.parents[:2]):
        config = folder / "config.yaml"
        if path.exists() and config.is_file():
            with suppress(ValueError):  # the config.yaml of another program
                return read_config(config)["stage"] == "teacher"
    return False
