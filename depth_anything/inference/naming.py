"""What outputs are called: below their folder, in the tree of their sources, no two alike on any disk."""

import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import count
from pathlib import Path, PurePosixPath


def relative_output_paths(names: Sequence[str], source: Path) -> list[PurePosixPath]:
    """Names as paths below the output; where a list has /elsewhere/a.jpg or ../a.jpg, from what all have in common.

    Args:
        names: as the source has them.
        source: the list, whose folder relative names start from.
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
    minor: Collection[int] = (),
) -> list[Path]:
    """Give each source a path without ending such that no two files made are one, where disks ignore case, too.

    Sources of one stem get their mark behind it (a_jpg, a_png), and if that is not enough a number.

    Args:
        stems: a source each, without its ending.
        marks: what tells it from others of its stem: its ending, mostly.
        endings: of every file that is made of a source.
        minor: positions of sources that give way: beside them, others keep their name.

    Example:
        >>> name_apart([PurePosixPath("a"), PurePosixPath("A")], ["jpg", "jpg"], endings=[".png"])
        [PosixPath('a_jpg'), PosixPath('A_jpg_2')]
    """
    alike = Counter(_fold_case(str(stem)) for i, stem in enumerate(stems) if i not in minor)
    taken: set[str] = set()
    targets = []
    for i, (stem, mark) in enumerate(zip(stems, marks, strict=True)):
        others = alike[_fold_case(str(stem))] - (i not in minor)
        name = f"{stem.name}_{mark}" if others and mark else stem.name
        for number in count(1):
            target = stem.parent / (name if number == 1 else f"{name}_{number}")
            made = {_fold_case(f"{target}{ending}") for ending in endings}
            if taken.isdisjoint(made):
                break
        taken |= made
        targets.append(Path(target))
    return targets


def _fold_case(name: str) -> str:
    """What a disk that ignores case, or how a letter with an accent is composed, takes a name for."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
