"""dry_run=true: print what a run would do, and raise the errors that it would raise."""

import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch

from depth_anything.data.address import is_remote, redact_secrets
from depth_anything.data.shards import open_set
from depth_anything.teachers.open_teacher import is_present, teacher_kind
from depth_anything.teachers.teacher import Teacher, TeacherFacts
from depth_anything.training.batch_plan import extra_sets, split_batch
from depth_anything.training.check_places import check_writable
from depth_anything.training.config import RunConfig, TrainerConfig
from depth_anything.training.data import needs_labels
from depth_anything.training.initialization import open_run_teacher
from depth_anything.training.plan_text import NOT_FOUND, PlanLine, is_local_set
from depth_anything.training.pseudolabel import ShardData, label_data_arguments
from depth_anything.training.resume import check_resume_checkpoint
from depth_anything.training.run_dir import RunDir
from depth_anything.training.stage_networks import StageNetworks, stage_networks

EXTRA_SET_ACTIONS = {"mix": "mixed in", "replay": "replayed"}


def print_plan(config: RunConfig, *, typed: Collection[str] = ()) -> None:
    """Print what a run would do, with the network on the meta device; nothing is written or downloaded.

    Sets and files that do not exist yet are marked; those that exist are opened as the run would open them.

    Args:
        config: The resolved config.
        typed: Dotted keys that were typed on the command line.

    Raises:
        ValueError: As the run would.
    """
    check_writable(config)
    networks = stage_networks(config)
    if config.stage == "pseudolabel":
        _print_run(config, networks.describe_network() if _is_one_network(config) else [])
        _print_labeling(config)
        return
    _check_run_dir(config, networks, typed)
    _print_run(config, [*networks.describe_network(), *networks.describe_training()])
    _print_sets(config.data.sets)
    labels = networks.describe_labels()
    if labels is not None:
        _print_lines([("labels", labels)])
    for key, sets in extra_sets(config).items():
        share = f" ({config.replay_share:.0%})" if key == "replay" and sets else ""
        _print_sets(sets, what=f"{EXTRA_SET_ACTIONS[key]}{share}")
    _print_batch(config, networks)


def _print_lines(lines: Iterable[PlanLine]) -> None:
    for heading, text in lines:
        print(f"{heading:<11} {text}")


def _print_run(config: RunConfig, lines: Iterable[PlanLine]) -> None:
    """Print the run folder, and what the networks of the stage say about themselves."""
    _print_lines([("run", f"{config.run_dir} (stage={config.stage}, size={config.size})"), *lines])


def _print_labeling(config: RunConfig) -> None:
    """Print the teacher and the sets of stage=pseudolabel."""
    teacher = open_run_teacher(config) if all(map(is_present, config.teachers)) else None
    for spec in config.teachers:
        print(f"teacher     {spec}{'' if is_present(spec) or is_remote(spec) else NOT_FOUND}")
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


def _print_batch(config: RunConfig, networks: StageNetworks) -> None:
    """Print how the batch is split over the devices of the config, and the number of passes over the data.

    Raises:
        UserError: If the batch cannot be split evenly over them.
    """
    batch, side = config.batch_size, config.image_size
    print(f"batch       {batch} crops of {side}×{side}; {batch * config.steps:,} samples in all")
    print(f"passes      {_describe_passes(config, networks)}")
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


def _describe_passes(config: RunConfig, networks: StageNetworks) -> str:
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
    records = _count_records(config, networks, sets, absent)
    scenes = {str(scene.root): scene.count for scene in config.sources.scenes.values()}
    drawn = {name: scenes.get(str(sets[name])) for name in absent}
    if None in drawn.values() or (absent and config.replay):
        return f"unknown until {', '.join(sorted(absent))} can be opened"
    repeat = config.data.repeat or {}
    records += sum(int(count or 0) * repeat.get(name, 1) for name, count in drawn.items())
    return f"{config.batch_size * config.steps / records:,.3g} over {records:,} records"


def _is_local_and_complete(config: RunConfig, name: str, root: str) -> bool:
    """Return whether a set, and its labels if the stage needs them, are local; remote sets are not opened."""
    if not is_local_set(root):
        return False
    data, labels = config.data.as_dict(), config.data.labels
    joined = name in config.data.sets and needs_labels(
        open_set(root),
        labels,
        in_meters=data.get("min_depth") is not None,
        captions=bool(data.get("captions")),
    )
    return not joined or (not is_remote(str(labels)) and (Path(str(labels)) / name).is_dir())


def _count_records(
    config: RunConfig, networks: StageNetworks, sets: Mapping[str, str], absent: Collection[str]
) -> int:
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
    with tempfile.TemporaryDirectory() as scratch:  # for the list of an unfinished label set
        arguments |= {"run_dir": scratch, "streams": config.streams or 1}
        data = networks.data_class(**arguments, micro_batch=1, patch=networks.planned_multiple)
        return data.open().stream.records


def _check_run_dir(config: RunConfig, networks: StageNetworks, typed: Collection[str]) -> None:
    """Check the run folder, the checkpoint, the starting weights and the validation set, as the run would."""
    folder = RunDir(config.run_dir, typed=typed, result=networks.result)
    if not config.overwrite:
        folder.compare(config, note=False)
        if folder.finished(config.steps):
            print(f"run         {folder.path} is finished; the command would do nothing")
    if config.resume and is_remote(config.resume):
        print(f"resume      {redact_secrets(config.resume)}, which is not opened now")
    elif config.resume and (config.overwrite or folder.newest_checkpoint() is None):
        for line in check_resume_checkpoint(Path(config.resume), config, typed=typed):
            print(f"resume      {line}")
    networks.check()
    where = networks.validation_folder if config.validation.benchmark is None else config.validation.root
    if where is not None and not is_remote(where) and Path(where).exists():
        networks.open_validation()
    elif where is not None:
        print(f"validation  {redact_secrets(where)}{'' if is_remote(where) else NOT_FOUND}")


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


def _print_sets(sets: Mapping[str, str], *, what: str = "set") -> None:
    for name, root in sets.items():
        found = is_remote(str(root)) or (Path(root) / "manifest.json").is_file()
        print(f"{what:<11} {name}: {redact_secrets(str(root))}{'' if found else NOT_FOUND}")
