"""Names of output files: the tree of the inputs below the output folder, and no two outputs with one name."""

import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import count
from pathlib import Path, PurePosixPath


def relative_output_paths(names: Sequence[str], source: Path) -> list[PurePosixPath]:
    """Turn the names of inputs into paths below the output folder.

    If a list names /elsewhere/a.jpg or ../a.jpg, all paths are relative to the inputs' common parent folder.

    Args:
        names: Names of the inputs.
        source: The list file; relative names start from its folder.
    """
    paths = [PurePosixPath(name) for name in names]
    if any(path.is_absolute() or ".." in path.parts for path in paths):
        full = [os.path.abspath(source.parent / name) for name in names]
        common = os.path.commonpath([os.path.dirname(name) for name in full])
        paths = [PurePosixPath(Path(os.path.relpath(name, common)).as_posix()) for name in full]
    return paths


def assign_unique_paths(
    stems: Sequence[PurePosixPath],
    marks: Sequence[str],
    *,
    endings: Sequence[str],
    low_priority: Collection[int] = (),
) -> list[Path]:
    """Give each input an output path without ending, such that no two output files collide on any file system.

    Names that differ in case or Unicode normalization only count as equal. Inputs with equal stems get their mark
    appended (a_jpg, a_png), and if that is not enough, a number.

    Args:
        stems: Path of each input without its ending.
        marks: What distinguishes inputs of one stem: usually the file's suffix.
        endings: Endings of all files that are written for an input.
        low_priority: Indexes of inputs that get a mark first, so that others of their stem keep their name.

    Example:
        >>> assign_unique_paths([PurePosixPath("a"), PurePosixPath("A")], ["jpg", "jpg"], endings=[".png"])
        [PosixPath('a_jpg'), PosixPath('A_jpg_2')]
    """
    uses = Counter(_fold_case(str(stem)) for i, stem in enumerate(stems) if i not in low_priority)
    taken: set[str] = set()
    targets = []
    for i, (stem, mark) in enumerate(zip(stems, marks, strict=True)):
        others = uses[_fold_case(str(stem))] - (i not in low_priority)
        name = f"{stem.name}_{mark}" if others and mark else stem.name
        for number in count(1):
            target = stem.parent / (name if number == 1 else f"{name}_{number}")
            files = {_fold_case(f"{target}{ending}") for ending in endings}
            if taken.isdisjoint(files):
                break
        taken |= files
        targets.append(Path(target))
    return targets


def _fold_case(name: str) -> str:
    """Normalize a name as file systems do that ignore case or the composition of accented letters."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
