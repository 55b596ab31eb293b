"""What was written by an earlier run, and may be replaced; everything else stays as it is."""

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path

import av

from depth_anything.inference.formats import ENDINGS

_FACTS = {"source", "quantity", "unit", "larger", "frames"}
_COMMENT = re.compile(r"(disparity|depth) \(\w+\), larger is (nearer|farther)")


def refuse_to_replace(outputs: Iterable[Path], *, inputs: Collection[Path]) -> None:
    """Make sure that nothing is replaced but what an earlier run wrote.

    Args:
        outputs: files and folders that are to be written.
        inputs: files and folders that are to be read.

    Raises:
        ValueError: an output is an input, or was not written by `depth-anything video`.
    """
    read = {path.resolve() for path in inputs}
    for path in outputs:
        if path.resolve() in read or any(path.exists() and path.samefile(other) for other in inputs):
            raise ValueError(f"{path} is read: give another folder for what is made of it")
        if (path.exists() or path.is_symlink()) and not is_ours(path):
            raise ValueError(f"{path} is in the way and was not made by this command: move it")


def is_ours(path: Path) -> bool:
    """Tell what `depth-anything video` wrote: a film by its comment, NAME.json by its keys, a folder of maps by both.

    A folder that holds something else, too, is not ours; an empty one is.
    """
    if path.suffix == ".json" and path.is_file():
        return _read_facts(path) is not None
    if path.is_file():
        try:
            with av.open(str(path.absolute()), options={"protocol_whitelist": "file"}) as film:
                return bool(_COMMENT.match(film.metadata.get("comment", "")))
        except (av.FFmpegError, ValueError):
            return False
    if not path.is_dir():
        return False
    held = list(path.iterdir())
    facts = _read_facts(path.with_name(path.name.rpartition("_")[0] + ".json"))
    endings = tuple(ENDINGS.values())
    return not held or (
        facts is not None
        and path.name.endswith(f"_{facts['quantity']}")
        and len(held) <= len(endings) * int(facts["frames"])
        and all(file.name.endswith(endings) and file.is_file() for file in held)
    )


def _read_facts(path: Path) -> dict | None:
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and facts.keys() >= _FACTS else None
