"""dry_run=true: print what a run would do, and raise the errors that it would raise."""

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from depth_anything.classes import make_class_table
from depth_anything.data.address import is_remote, redact_secrets
from depth_anything.data.shards import open_set
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.lora import add_adapters
from depth_anything.model.masked_autoencoder import MaskedAutoencoder
from depth_anything.model.segmentation import MASK_HEADS, SegmentationModel
from depth_anything.teachers.open_teacher import is_present, teacher_kind
from depth_anything.teachers.teacher import Teacher, TeacherFacts
from depth_anything.training.batch_plan import extra_sets, split_batch
from depth_anything.training.check_config import build_head
from depth_anything.training.config import RecipeConfig, RunConfig, TrainerConfig
from depth_anything.training.data import TrainData
from depth_anything.training.diffusion import check_base, meta_controlnet
from depth_anything.training.image_data import ImageData
from depth_anything.training.initialization import (
    build_random_autoencoder,
    check_initial_weights,
    crop_multiple,
    open_run_teacher,
)
from depth_anything.training.pseudolabel import ShardData, label_data_arguments
from depth_anything.training.resume import check_resume_checkpoint
from depth_anything.training.run_dir import RunDir
from depth_anything.training.segmentation_data import SegmentationData, read_classes
from depth_anything.training.segmentation_setup import segmentation_validation_folder
from depth_anything.training.stage_networks import result_file
from depth_anything.training.validation import open_validation_task

Network = DepthAnything | MaskedAutoencoder | SegmentationModel

EXTRA_SET_ACTIONS = {"mix": "mixed in", "replay": "replayed"}
NOT_FOUND = " (not found yet)"


def count_parameters(parameters: Any) -> str:
    """Return the number of values in parameters, with thousands separators."""
    return f"{sum(p.numel() for p in parameters):,}"


def print_plan(config: RunConfig, *, typed: Collection[str] = ()) -> None:
    """Print what a run would do, with the network on the meta device; nothing is written or downloaded.

    Sets and files that do not exist yet are marked; those that exist are opened as the run would open them.

    Args:
        config: The resolved config.
        typed: Dotted keys that were typed on the command line.

    Raises:
        ValueError: As the run would.
    """
    _check_run_dir(config, typed)
    if config.stage == "pseudolabel" and not _is_one_network(config):
        print(f"run         {config.run_dir} (stage={config.stage}, size={config.size})")
        _print_labeling(config)
        return
    if config.stage == "controlnet":
        _print_controlnet(config)
        return
    model = _print_network(config)
    if config.stage == "pseudolabel":
        _print_labeling(config)
        return
    _print_recipe(config, model)
    _print_sets(config.data.sets)
    if config.data.labels and (config.stage != "metric" or config.replay):
        print(f"labels      {redact_secrets(str(config.data.labels))}")
    for key, sets in extra_sets(config).items():
        share = f" ({config.replay_share:.0%})" if key == "replay" and sets else ""
        _print_sets(sets, what=f"{EXTRA_SET_ACTIONS[key]}{share}")
    _print_batch(config)


def _build_network(config: RunConfig) -> Network:
    """Build the network; of stage=segmentation with one class if no set of the run exists yet."""
    if config.stage == "pretrain":
        return build_random_autoencoder(config)
    if config.stage != "segmentation":
        return DepthAnything(config.encoder, max_depth=config.max_depth, head=build_head(config))
    found = {
        name: root
        for name, root in config.data.sets.items()
        if _is_local_and_complete(config, name, str(root))
    }
    classes = read_classes(found) if found else make_class_table(["unknown"])
    print(
        f"classes     {len(classes) if found else 'unknown until the sets exist (counted as one)'}, head={config.head}"
    )
    return SegmentationModel(
        config.encoder,
        classes=classes,
        head=build_head(config) or config.head,
        head_options=config.head_options,
    )


def _print_network(config: RunConfig) -> Network:
    """Print the run folder and the size of the network; return the network on the meta device."""
    with torch.device("meta"):
        model = _build_network(config)
        model.pretrained.requires_grad_(not config.freeze_encoder)
    head = [parameter for name, parameter in model.named_parameters() if not name.startswith("pretrained.")]
    part = "decoder" if isinstance(model, MaskedAutoencoder) else "head"
    encoder = list(model.pretrained.parameters())
    print(f"run         {config.run_dir} (stage={config.stage}, size={config.size})")
    print(f"network     {config.encoder}: {count_parameters(model.parameters())} parameters")
    print(f"            encoder {count_parameters(encoder)}, {part} {count_parameters(head)}")
    return model


def _print_controlnet(config: RunConfig) -> None:
    """Print the plan of stage=controlnet; of a base on the hub nothing is read."""
    recipe = config.recipe
    print(f"run         {config.run_dir} (stage={config.stage}, size={config.size})")
    print(f"base        {config.base or 'random weights, written to the run folder'}{_describe_base(config)}")
    print(f"start       {config.init or 'the weights of the UNet, and zero convolutions'}")
    optimizer = config.optimizer.target.rpartition(".")[2]
    print(f"group       controlnet: {optimizer}, rate {recipe.lr:g}")
    print(f"schedule    {recipe.schedule}, warm-up {recipe.warmup:.0%} of {config.steps:,} steps")
    print(f"loss        noise or velocity; {recipe.caption_dropout:.0%} of the captions dropped")
    _print_sets(config.data.sets)
    print(f"labels      {redact_secrets(str(config.data.labels))}, of the sets without depth")
    _print_batch(config)


def _describe_base(config: RunConfig) -> str:
    """Describe the base of stage=controlnet as the end of a line: its size if it is a folder."""
    if config.base is None:
        return ""
    if not Path(config.base).is_dir():
        return " (on the hub)"
    return f" (ControlNet of {count_parameters(meta_controlnet(config.base).parameters())} parameters)"


def _print_labeling(config: RunConfig) -> None:
    """Print the teacher and the sets of stage=pseudolabel."""
    teacher = open_run_teacher(config) if all(map(is_present, config.teachers)) else None
    for spec in config.teachers:
        print(f"teacher     {spec}{'' if is_present(spec) else NOT_FOUND}")
    if len(config.teachers) > 1:
        kept = config.label_confidence or config.teacher_rule == "confidence"
        print(f"            rule {config.teacher_rule}{', stored with their agreement' if kept else ''}")
    if config.label_crops:
        print(f"            and {config.label_crops} crops of {config.label_crop_scale:g} of the short side")
    if teacher is not None:
        _print_facts(teacher.facts)
    print(f"labels      {config.labels}")
    _check_label_teacher(config, teacher)
    _print_sets(config.sources.images)
    print(f"batch       {config.batch_size} images of one shape and shard, short side {config.image_size}")


def _is_one_network(config: RunConfig) -> bool:
    """Return whether the teacher is one network of this project or of the authors."""
    return [teacher_kind(spec) for spec in config.teachers] == ["network"]


def _print_facts(facts: TeacherFacts) -> None:
    """Print what a teacher predicts, how that becomes disparity, its license and its fingerprint."""
    stored = f"stored as {facts.conversion}" if facts.conversion else "stored unchanged"
    print(f"            {facts.quantity}, {facts.unit}; {stored}")
    print(f"            license {facts.licence or 'unknown (teacher_licence=NAME states it)'}")
    print(f"            {facts.fingerprint[:23]}")


def _print_recipe(config: RunConfig, model: Network) -> None:
    """Print what is trained and how, and the starting weights."""
    recipe = config.recipe
    if config.lora and isinstance(model, DepthAnything):
        with torch.device("meta"):
            add_adapters(model, config.lora)
        print(f"adapters    LoRA of rank {config.lora} in the frozen encoder")
    groups = (
        ("encoder", model.encoder_parameters(), recipe.encoder_lr),
        ("decoder" if config.stage == "pretrain" else "head", model.head_parameters(), recipe.head_lr),
    )
    optimizer = config.optimizer.target.rpartition(".")[2]
    for name, parameters, rate in groups:
        print(f"group       {name}: {count_parameters(parameters)} trained, {optimizer}, rate {rate:g}")
    print(f"schedule    {recipe.schedule}, warm-up {recipe.warmup:.0%} of {config.steps:,} steps")
    print(f"loss        {_describe_loss(config)}")
    copied = {"encoder": ", encoder only", "all": ", encoder and head"}.get(config.start or "", "")
    found = "" if config.init in (None, "hub", "scratch") or Path(config.init).exists() else NOT_FOUND
    print(f"start       {config.init or 'random weights'}{copied if config.init else ''}{found}")


def _print_batch(config: RunConfig) -> None:
    """Print how the batch is split over the devices of the config, and the number of passes over the data.

    Raises:
        UserError: If the batch cannot be split evenly over them.
    """
    batch, side = config.batch_size, config.image_size
    print(f"batch       {batch} crops of {side}×{side}; {batch * config.steps:,} samples in all")
    print(f"passes      {_describe_passes(config)}")
    devices = count_devices(config.trainer)
    if devices is not None:
        counts = [devices]
        split_batch(batch, devices, config.micro_batch)
    else:
        counts = [1, 8, 64]
        split_batch(batch, max(1, torch.cuda.device_count()), config.micro_batch)
    for number in counts:
        try:
            micro, accumulation = split_batch(batch, number, config.micro_batch)
            split = f"{micro} per device × {accumulation} accumulated"
        except ValueError as error:
            split = str(error)
        print(f"            {number:2d} device{'s' if number > 1 else ' '}: {split}")


def count_devices(trainer: TrainerConfig) -> int | None:
    """Return the number of devices over all nodes; None if it depends on the machine, as with "auto"."""
    devices = trainer.devices
    if isinstance(devices, str) and devices != "auto":
        devices = [part for part in devices.split(",") if part.strip()] if "," in devices else int(devices)
    number = len(devices) if isinstance(devices, list) else devices
    return number * trainer.num_nodes if isinstance(number, int) and number > 0 else None


def _describe_passes(config: RunConfig) -> str:
    """Open the sets that exist, and describe how often a run sees all records.

    Raises:
        ValueError: As the run would: for a damaged set, another unit, or labels of other images.
    """
    if not config.data.target.endswith((".TrainData", ".ImageData", ".SegmentationData")):
        return "unknown for your own data class"
    sets = {**config.data.sets}
    for added in extra_sets(config).values():
        sets.update(added)
    absent = {name for name, root in sets.items() if not _is_local_and_complete(config, name, str(root))}
    records = _count_records(config, sets, absent)
    scenes = {str(scene.root): scene.count for scene in config.sources.scenes.values()}
    drawn = {name: scenes.get(str(sets[name])) for name in absent}
    if None in drawn.values() or (absent and config.replay):
        return f"unknown until {', '.join(sorted(absent))} can be opened"
    repeat = config.data.repeat or {}
    records += sum(int(count or 0) * repeat.get(name, 1) for name, count in drawn.items())
    return f"{config.batch_size * config.steps / records:,.3g} over {records:,} records"


def _is_local_and_complete(config: RunConfig, name: str, root: str) -> bool:
    """Return whether a set, and its labels if the stage needs them, are local; remote sets are not opened."""
    if is_remote(root) or not (Path(root) / "manifest.json").is_file():
        return False
    labels = config.data.labels
    joined = labels is not None and name in config.data.sets and config.stage != "metric"
    if config.stage == "controlnet" and open_set(root).meta.get("quantity") is not None:
        joined = False  # it has depth of its own
    return not joined or (not is_remote(str(labels)) and (Path(str(labels)) / name).is_dir())


def _count_records(config: RunConfig, sets: Mapping[str, str], absent: Collection[str]) -> int:
    """Open the sets of a run that exist, as the run would; return the number of records in a pass over them."""
    arguments = {key: value for key, value in config.data.as_dict().items() if key != "_target_"}
    for key in ("sets", "labelled", "images"):
        if key in arguments:
            arguments[key] = {n: root for n, root in arguments[key].items() if n not in absent}
    for key, added in extra_sets(config).items():
        if key in arguments:
            arguments[key] = [name for name in added if name not in absent]
    for key in ("repeat", "sky"):
        if isinstance(arguments.get(key), Mapping):
            arguments[key] = {k: v for k, v in arguments[key].items() if k.partition("/")[0] not in absent}
    if not arguments["sets"]:
        return 0
    patch = 1 if config.stage == "controlnet" else crop_multiple(config)  # the VAE of the base knows its own
    with tempfile.TemporaryDirectory() as scratch:  # for the list of an unfinished label set
        arguments |= {"run_dir": scratch, "streams": config.streams or 1}
        classes: dict[str, type] = {"pretrain": ImageData, "segmentation": SegmentationData}
        data_class = classes.get(config.stage, TrainData)
        return data_class(**arguments, micro_batch=1, patch=patch).open().stream.records


def _check_run_dir(config: RunConfig, typed: Collection[str]) -> None:
    """Check the run folder, the checkpoint, the starting weights and the validation set, as the run would."""
    folder = RunDir(config.run_dir, typed=typed, result=result_file(config))
    if config.stage == "pseudolabel":
        return
    if not config.overwrite:
        folder.compare(config, note=False)
        if folder.finished(config.steps):
            print(f"run         {folder.path} is finished; the command would do nothing")
    if config.resume and (config.overwrite or folder.newest_checkpoint() is None):
        for line in check_resume_checkpoint(Path(config.resume), config, typed=typed):
            print(f"resume      {line}")
    if config.stage == "controlnet":
        _check_controlnet(config)
        return
    check_initial_weights(config)
    if config.stage == "pretrain":
        return
    name, root = config.validation.benchmark, config.sources.validation
    if config.stage == "segmentation":
        root = segmentation_validation_folder(config)
    where = config.validation.root if name is not None else root
    if where is not None and not is_remote(str(where)) and Path(where).exists():
        open_validation_task(config)
    elif where is not None:
        print(f"validation  {redact_secrets(str(where))}{'' if is_remote(str(where)) else NOT_FOUND}")


def _check_controlnet(config: RunConfig) -> None:
    """Check the base and the validation set of stage=controlnet, as far as they are on this machine."""
    if config.base is not None:
        check_base(config.base)
    root = config.sources.validation
    if root is not None and not is_remote(root) and Path(root).exists():
        open_set(root)
    elif root is not None:
        print(f"validation  {redact_secrets(root)}{'' if is_remote(root) else NOT_FOUND}")


def _check_label_teacher(config: RunConfig, teacher: Teacher | None = None) -> None:
    """Check that existing labels are from the same teacher, if the teacher exists too."""
    labeled = {
        name: root
        for name, root in config.data.sets.items()
        if not is_remote(str(root))
        and (Path(root) / "manifest.json").is_file()
        and (Path(str(config.labels)) / name).is_dir()
    }
    if not labeled or (teacher is None and not all(map(is_present, config.teachers))):
        return
    teacher = teacher or open_run_teacher(config)
    arguments = {
        key: value for key, value in config.data.as_dict().items() if key not in ("_target_", "sets")
    }
    arguments |= label_data_arguments(teacher, image_size=config.image_size, precision=config.data.precision)
    ShardData(**arguments, sets=labeled)


def _describe_loss(config: RunConfig) -> str:
    recipe = config.recipe
    if config.stage == "pretrain":
        target = "patches of mean 0 and deviation 1" if recipe.normalize_targets else "pixels"
        return f"squared error of the {recipe.mask_ratio:.0%} masked patches; targets: {target}"
    if config.stage == "segmentation":
        masks = config.head in MASK_HEADS and config.model.head is None
        return "classes, masks and dice of matched masks" if masks else "cross-entropy of pixels, per image"
    if config.stage == "metric":
        silog = f"silog, variance focus {recipe.variance_focus:g}, for depth from {config.min_depth:g} to "
        silog += f"{config.max_depth:g} m"
        if config.canonical_focal is not None:
            silog += f" of a camera of {config.canonical_focal:g} px"
        if not config.replay:
            return silog
        return f"{silog}; replayed: {_describe_invariant_losses(recipe)}"
    return _describe_invariant_losses(recipe)


def _describe_invariant_losses(recipe: RecipeConfig) -> str:
    terms = [f"ssi {recipe.ssi_weight:g}", f"gm {recipe.gm_weight:g}"]
    if recipe.alignment_weight:
        terms.append(f"features {recipe.alignment_weight:g} (tolerance {recipe.alignment_tolerance:g})")
    if recipe.local_weight:
        terms.append(f"local {recipe.local_weight:g}")
    other = "" if recipe.normalization == "global" else f"; {recipe.normalization} normalization"
    if recipe.normalization in ("hybrid", "local"):
        other += f", {recipe.normalization_levels} levels"
    return f"{' : '.join(terms)}; largest {recipe.trim:.0%} of residuals ignored{other}"


def _print_sets(sets: Mapping[str, str], *, what: str = "set") -> None:
    for name, root in sets.items():
        found = is_remote(str(root)) or (Path(root) / "manifest.json").is_file()
        print(f"{what:<11} {name}: {redact_secrets(str(root))}{'' if found else NOT_FOUND}")
