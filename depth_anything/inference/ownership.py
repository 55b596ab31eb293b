"""What `depth-anything video` wrote and may replace: films, folders of maps and their records, known by NAME.json."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import av

from depth_anything.inference.formats import ENDINGS
from depth_anything.inference.overwrite import (
    COMMAND_KEY,
    DIGESTS_KEY,
    check_overwrite,
    file_sha256,
    read_record,
)

COMMAND = "depth-anything video"
MAPS_KEY = "maps"
"""Key of a record: by the name of a folder of maps, how many files it holds, and their bytes."""

_LEGACY_KEYS = {"source", "quantity", "unit", "larger", "frames", "range", "smooth"}
"""Of records of the versions that kept no digests; their films have a comment instead."""
_DEPTH_COMMENT = re.compile(r"(disparity|depth) \(\w+\), larger is (nearer|farther)")


def check_video_overwrite(
    outputs: Iterable[tuple[Path, Path]], *, inputs: Callable[[], Iterable[Path]]
) -> set[Path]:
    """Refuse to replace what is read, and what the video command did not write.

    Args:
        outputs: each a film, folder of maps or record that is to be written, and its record.
        inputs: returns the files that are read.

    Returns:
        The outputs that exist and may be replaced.

    Raises:
        ValueError: names what stays.
    """
    records: dict[Path, Path] = {}
    folders: dict[Path, Path] = {}
    for path, record in outputs:
        if os.path.isdir(path) and not os.path.islink(path) and path.suffix not in (".mp4", ".json"):
            folders[path] = record
            records |= {file: record for file in path.iterdir()}
        else:
            records[path] = record
    own_folders = {path for path, record in folders.items() if _is_own_folder(path, record)}

    def own(path: Path) -> bool:
        return path.parent in own_folders if path.parent in folders else _is_own_file(path, records[path])

    free = check_overwrite(records, own=own, inputs=inputs)
    return {path for path in free if path.parent not in folders} | set(folders)


def build_video_record(
    record: Path, *, films: dict[str, str], maps: dict[str, tuple[int, int]]
) -> dict[str, Any]:
    """Make the part of a record by which the command knows its files again, those of earlier runs included.

    Args:
        record: NAME.json, which may exist.
        films: digest by name.
        maps: by name of each folder, number and bytes of its files.
    """
    facts = read_record(record)
    before = facts if facts.get(COMMAND_KEY) == COMMAND else {}
    counted = {name: {"files": files, "bytes": size} for name, (files, size) in maps.items()}
    return {
        COMMAND_KEY: COMMAND,
        DIGESTS_KEY: {**before.get(DIGESTS_KEY, {}), **films},
        MAPS_KEY: {**before.get(MAPS_KEY, {}), **counted},
    }


def _is_own_file(path: Path, record: Path) -> bool:
    facts = read_record(record)
    if path == record:
        return facts.get(COMMAND_KEY) == COMMAND or _is_legacy_record(facts)
    if _is_legacy_record(facts):
        return _has_depth_comment(path)
    digests = facts.get(DIGESTS_KEY)
    return isinstance(digests, dict) and digests.get(path.name) == file_sha256(path)


def _is_own_folder(path: Path, record: Path) -> bool:
    """Tell by number and bytes of its files, since there may be many: what was added or edited shows."""
    facts, held = read_record(record), list(path.iterdir())
    if not all(file.is_file() and file.name.endswith(tuple(ENDINGS.values())) for file in held):
        return False
    if _is_legacy_record(facts):
        frames = facts["frames"]
        return isinstance(frames, int) and frames > 0 and len(held) % frames == 0
    maps = facts.get(MAPS_KEY)
    size = sum(file.stat().st_size for file in held)
    return isinstance(maps, dict) and maps.get(path.name) == {"files": len(held), "bytes": size}


def _is_legacy_record(facts: dict[str, Any]) -> bool:
    return COMMAND_KEY not in facts and facts.keys() >= _LEGACY_KEYS


def _has_depth_comment(path: Path) -> bool:
    try:
        with av.open(str(path.absolute()), options={"protocol_whitelist": "file"}) as film:
            return bool(_DEPTH_COMMENT.match(film.metadata.get("comment", "")))
    except (av.FFmpegError, ValueError):
        return False
