"""What images are mapped, from one source or several, and what is made of each is called."""

import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from depth_anything.inference.naming import assign_unique_paths, relative_output_paths
from depth_anything.ingest.find_files import IMAGE_SUFFIXES
from depth_anything.ingest.photographs import Photograph, list_photographs


@dataclass
class ImageList:
    """What was found to map.

    Attributes:
        photographs: The files, images or not.
        targets: What is made of each is called this, and an ending; below the folder of the maps.
        expected: Names of those that are images by their suffix, or were named one by one.
        missing: Of several sources, what cannot be listed, and why.
        paths: The files on disk that are read.
    """

    photographs: list[Photograph]
    targets: list[Path]
    expected: set[str]
    missing: dict[str, str]
    paths: list[Path]


def list_images(sources: Sequence[str | Path], *, leave_out: str | Path, endings: Sequence[str]) -> ImageList:
    """List the images of one or several sources and name what is made of each, no two alike.

    Args:
        sources: Each an image, folder, list or tar. Of several, names begin where their paths part.
        leave_out: The folder of the maps, which is passed over.
        endings: Of every file that is made of an image.

    Raises:
        ValueError: A single source that is nothing of these, or no source at all.
    """
    if not sources:
        raise ValueError("give an image, or a folder, list or tar of them")
    several = len(sources) > 1
    photographs: list[Photograph] = []
    paths: list[Path] = []
    one_by_one: set[str] = set()
    missing: dict[str, str] = {}
    for source in map(Path, dict.fromkeys(os.fspath(source) for source in sources)):
        try:
            found = list_photographs(source, leave_out=leave_out)
        except (ValueError, OSError) as error:
            if not several:
                raise
            missing[str(source)] = str(error)
            continue
        inside = source.is_dir() or tarfile.is_tarfile(
            source
        )  # else an image, or a list beside what it names
        folder = source if inside else source.parent
        if several:  # each is named as seen from where the command was typed
            found = [replace(photograph, name=os.path.join(folder, photograph.name)) for photograph in found]
        paths += [source] if not source.is_dir() else []
        paths += [Path(photograph.name) if several else folder / photograph.name for photograph in found]
        one_by_one |= set() if inside else {photograph.name for photograph in found}
        photographs += found
    names = [photograph.name for photograph in photographs]
    below = relative_output_paths(
        [os.path.abspath(name) for name in names] if several else names, Path(sources[0])
    )
    expected = {
        name for name, path in zip(names, below, strict=True) if _has_image_suffix(path) or name.endswith("/")
    }
    return ImageList(photographs, _output_paths(below, endings), expected | one_by_one, missing, paths)


def _output_paths(paths: Sequence[PurePosixPath], endings: Sequence[str]) -> list[Path]:
    """Name what is made of each file; what does not look like an image gives way."""
    minor = {i for i, path in enumerate(paths) if not _has_image_suffix(path)}
    stems, marks = [path.parent / path.stem for path in paths], [path.suffix[1:] for path in paths]
    return assign_unique_paths(stems, marks, endings=endings, minor=minor)


def _has_image_suffix(path: PurePosixPath) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES
