"""Where a result comes from: the sets, teachers and starting weights that model files and cards record."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from depth_anything.data.reader import JoinedRecords, Records
from depth_anything.errors import PSEUDOLABEL_COMMAND, UserError
from depth_anything.licenses import combine_licenses
from depth_anything.model.card import build_card, build_encoder_card, write_card
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.masked_autoencoder import MaskedAutoencoder, save_encoder
from depth_anything.model.official_weights import name_hints
from depth_anything.model.weights import (
    fingerprint,
    load_model,
    save_model,
)
from depth_anything.teachers.open_teacher import (
    PREFIXES,
    is_hub_name,
    teacher_kind,
)
from depth_anything.training.config import RunConfig

Network = TypeVar("Network", bound=DepthAnything | MaskedAutoencoder)


def add_provenance(model: Network, config: RunConfig, sources: Sequence[Records | JoinedRecords]) -> Network:
    """Store in a network what it is trained on, and the combined license of its data, teachers and starting weights.

    Raises:
        UserError: If labels of a metric teacher were written by a version that did not convert them to disparity.
    """
    for source in sources:
        if isinstance(source, JoinedRecords):
            _reject_metric_labels(source)
    data = [set_provenance(source) for source in sources]
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
        path: model.safetensors or model-ema.safetensors in the folder of the run.
        title: Name of the run.
        measured: Metric name to its value at the last validation.
    """
    if isinstance(model, MaskedAutoencoder):
        save_encoder(model, path)
        text = build_encoder_card(model, file=path.name, title=title)
        write_card(text, path.parent, file=path.name)
        return
    save_model(model, path)
    write_run_card(model, path.parent, title=title, measured=measured, file=path.name)


def write_run_card(
    model: DepthAnything,
    folder: Path,
    *,
    title: str,
    measured: Mapping[str, str],
    file: str = "model.safetensors",
) -> None:
    """Write the model card of a run into its folder, unless a user has edited the card that is there.

    Args:
        model: The model as it is saved.
        folder: Folder of the run.
        title: Name of the run.
        measured: Metric name to its value at the last validation.
        file: The model's file.
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
        file=file,
        form="safetensors",
        title=title,
        measured={"Evaluation": table} if rows else {},
    )
    write_card(text, folder, file=file)


def set_provenance(source: Records | JoinedRecords) -> dict[str, Any]:
    """Return what a model's file and card say of a set: its name, records, license, and the teacher of its labels."""
    if isinstance(source, Records):
        licence = source.set.meta.get("licence")
        return {"set": source.name, "records": source.set.records, "licence": licence, "teacher": None}
    teacher = source.labels.meta["teacher"]
    return {
        "set": source.name,
        "records": source.labels.records,
        "licence": source.images.meta.get("licence"),
        "teacher": {
            "file": short_teacher_name(teacher.get("file", "a model")),
            "licence": teacher.get("licence"),
            "fingerprint": teacher["fingerprint"],
        },
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


def short_path(path: str | Path) -> str:
    """Return the name of a file, with its folder if the name alone is generic."""
    path = Path(path)
    return "/".join(path.parts[-2:]) if path.stem in ("model", "best", "last") else path.name


def short_teacher_name(spec: str) -> str:
    """Return a teacher as it was typed, without the folders of its path.

    >>> [short_teacher_name(text) for text in ("folder:/home/me/maps", "transformers:apple/DepthPro-hf", "a/b.pth")]
    ['folder:maps', 'transformers:apple/DepthPro-hf', 'b.pth']
    >>> short_teacher_name("[runs/big.pth,folder:/home/me/maps]")
    '[big.pth,folder:maps]'
    """
    if spec.startswith("[") and spec.endswith("]"):
        return f"[{','.join(map(short_teacher_name, spec[1:-1].split(',')))}]"
    kind, (prefix, _, name) = teacher_kind(spec), spec.partition(":")
    if kind == "function" or (kind == "transformers" and is_hub_name(name) and not Path(name).exists()):
        return spec
    return f"{prefix}:{Path(name).name}" if kind in PREFIXES else short_path(spec)
