"""Check the places of a config: whether a run can read and write there at all. Nothing is opened."""

import os
from collections.abc import Iterator
from pathlib import Path

from depth_anything.data.address import is_http, is_remote, redact_secrets, url_scheme
from depth_anything.data.fsspec_io import supports_fsspec
from depth_anything.data.local_copy import check_readable
from depth_anything.data.store import open_store
from depth_anything.errors import UserError
from depth_anything.teachers.open_teacher import teacher_kind
from depth_anything.training.config import RunConfig


def check_places(config: RunConfig) -> None:
    """Refuse addresses at which a run cannot read or write what it needs, and files in place of folders.

    Raises:
        UserError: Naming the key and the place; or a package is missing that an address needs.
    """
    for key, place in _written_places(config):
        if is_remote(place):
            open_store(place)
        elif not (parent := _existing_parent(place)).is_dir():
            of_it = "" if str(parent) == place else f", so {place} cannot be made"
            raise UserError(f"{parent} is a file, not a folder{of_it}", f"type another {key}=FOLDER")
    for key in ("init", "resume"):
        place = getattr(config, key)
        if place is not None:
            check_readable(place, f"{key}=")
    for spec in config.teachers if config.teacher else ():
        _check_teacher(spec)
    for name, root in (config.data.sets if config.data.has("sets") else {}).items():
        root = str(root)
        if is_remote(root) and not is_http(root) and url_scheme(root) != "pipe" and not supports_fsspec(root):
            raise UserError(
                f"the set {name} is at {redact_secrets(root)}, and {url_scheme(root)}:// is unknown",
                "type a folder, http://…, s3://…, gs://… or pipe:COMMAND",
            )


def check_writable(config: RunConfig) -> None:
    """Check that this user may write to the local folders of a run; not for a plan of another machine.

    Raises:
        UserError: Naming the key and the folder.
    """
    for key, place in _written_places(config):
        if not is_remote(place) and not os.access(parent := _existing_parent(place), os.W_OK | os.X_OK):
            raise UserError(f"{parent} cannot be written, so {place} cannot", f"type another {key}=FOLDER")


def _written_places(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the folders and addresses that a run writes to, each with the key that chooses it."""
    yield "output_dir", config.run_dir
    if config.stage == "pseudolabel" and config.labels is not None:
        yield "labels", config.labels
    if config.stage_to is not None:
        yield "stage_to", config.stage_to
    if config.mirror.folder is not None and is_remote(config.run_dir):
        yield "mirror.folder", config.mirror.folder


def _existing_parent(place: str) -> Path:
    """Return the folder or file itself, or the first of its parents that exists."""
    path = Path(place.removeprefix("file://")).absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def _check_teacher(spec: str) -> None:
    kind = teacher_kind(spec)
    if kind == "network":
        check_readable(spec, "teacher=")
    elif kind != "function" and is_remote(spec if kind == "onnx" else spec.partition(":")[2]):
        raise UserError(
            f"teacher={redact_secrets(spec)}: only models of this project and of the authors are read from addresses",
            "download it, and type the file or folder",
        )
