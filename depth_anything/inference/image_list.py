"""The list of images to predict, from one source or several, with an output path for each."""

import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath, PurePosixPath

from depth_anything.inference.naming import assign_unique_paths, relative_output_paths
from depth_anything.ingest.find_files import IMAGE_SUFFIXES, read_regular_file
from depth_anything.ingest.photographs import Photograph, list_photographs


@dataclass
class ImageList:
    """Files to predict.

    Attributes:
        photographs: The files, images or not.
        targets: Output path of each below the output folder, without ending.
        expected: Names of those that must give a map: files with an image's suffix, and files named one by one.
        missing: If there are several sources: those that cannot be listed, and the reason.
        paths: All files on disk that are read.
    """

    photographs: list[Photograph]
    targets: list[Path]
    expected: set[str]
    missing: dict[str, str]
    paths: list[Path]


def list_images(sources: Sequence[str | Path], *, leave_out: str | Path, endings: Sequence[str]) -> ImageList:
    """List the images of one or several sources and assign each a unique output path.

    Args:
        sources: Each an image, folder, list file or tar. Names of several sources start where their paths differ.
        leave_out: The output folder, which is not searched.
        endings: Endings of all files that are written for an image.

    Raises:
        ValueError: There is no source, or the only one does not exist or is of another kind.
    """
    if not sources:
        raise ValueError("give an image, or a folder, list or tar of them")
    several = len(sources) > 1
    photographs: list[Photograph] = []
    paths: list[Path] = []
    named: set[str] = set()
    missing: dict[str, str] = {}
    for source in map(Path, dict.fromkeys(os.fspath(source) for source in sources)):
        try:
            files = _list_source(source, leave_out)
        except (ValueError, OSError) as error:
            if not several:
                raise
            missing[str(source)] = str(error)
            continue
        is_container = source.is_dir() or tarfile.is_tarfile(source)
        folder = source if is_container else source.parent  # names of a list are relative to its folder
        if several:  # names are then relative to the working directory
            files = [replace(photograph, name=os.path.join(folder, photograph.name)) for photograph in files]
        if not source.is_dir():
            paths.append(source)
        paths += [Path(photograph.name) if several else folder / photograph.name for photograph in files]
        if not is_container:
            named |= {photograph.name for photograph in files}
        photographs += files
    names = [photograph.name for photograph in photographs]
    relative = relative_output_paths(
        [os.path.abspath(name) for name in names] if several else names, Path(sources[0])
    )
    named |= {  # a name with "/" at its end is a folder that cannot be listed
        name
        for name, path in zip(names, relative, strict=True)
        if _has_image_suffix(path) or name.endswith("/")
    }
    return ImageList(photographs, _output_paths(relative, endings), named, missing, paths)


def _list_source(source: Path, leave_out: str | Path) -> list[Photograph]:
    if _has_image_suffix(source) and source.is_file():
        return [Photograph(source.name, source.stat().st_size, partial(read_regular_file, source))]
    return list_photographs(source, leave_out=leave_out)


def _output_paths(paths: Sequence[PurePosixPath], endings: Sequence[str]) -> list[Path]:
    """Assign output paths; files without an image's suffix do not change the names of images."""
    others = {i for i, path in enumerate(paths) if not _has_image_suffix(path)}
    stems, marks = [path.parent / path.stem for path in paths], [path.suffix[1:] for path in paths]
    return assign_unique_paths(stems, marks, endings=endings, low_priority=others)


def _has_image_suffix(path: PurePath) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES
