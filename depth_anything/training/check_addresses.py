"""Check the addresses of a config: whether a run can read and write there at all. No request is sent."""

from collections.abc import Iterator

from depth_anything.data.address import is_http, is_remote, redact_secrets, url_scheme
from depth_anything.data.fsspec_io import supports_fsspec
from depth_anything.data.local_copy import check_readable
from depth_anything.data.store import open_store
from depth_anything.errors import UserError
from depth_anything.teachers.open_teacher import teacher_kind
from depth_anything.training.config import RunConfig


def check_addresses(config: RunConfig) -> None:
    """Refuse addresses at which a run cannot read or write what it needs.

    Raises:
        UserError: Naming the key and the address; or a package is missing that the address needs.
    """
    open_store(config.run_dir)
    if config.stage == "pseudolabel" and config.labels is not None:
        open_store(config.labels)
    for key in ("init", "resume"):
        place = getattr(config, key)
        if place is not None:
            check_readable(place, f"{key}=")
    for spec in config.teachers if config.teacher else ():
        kind = teacher_kind(spec)
        if kind == "network":
            check_readable(spec, "teacher=")
        elif kind != "function" and is_remote(spec.partition(":")[2] if kind != "onnx" else spec):
            raise UserError(
                f"teacher={redact_secrets(spec)}: only models of this project and of the authors are read from "
                "addresses",
                "download it, and type the file or folder",
            )
    for name, root in _sets(config):
        if is_remote(root) and not is_http(root) and url_scheme(root) != "pipe" and not supports_fsspec(root):
            raise UserError(
                f"the set {name} is at {redact_secrets(root)}, and {url_scheme(root)}:// is unknown",
                "type a folder, http://…, s3://…, gs://… or pipe:COMMAND",
            )


def _sets(config: RunConfig) -> Iterator[tuple[str, str]]:
    for group in (config.data.sets if config.data.has("sets") else {},):
        for name, root in group.items():
            yield name, str(root)
