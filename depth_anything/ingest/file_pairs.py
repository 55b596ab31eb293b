"""Images and maps of a user's own set, matched by the text in place of {stem} in their paths."""

import os
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from depth_anything.ingest.file_list import escape_field, unescape_field
from depth_anything.ingest.find_files import IMAGE_SUFFIXES, walk_files
from depth_anything.ingest.maps import read_bytes

T = TypeVar("T")


@dataclass(frozen=True)
class FilePairs:
    """The files that were found, as paths below the folder of the YAML file.

    Attributes:
        matched: Name to (image, map).
        images: Images without a map, by name.
        maps: Maps without an image, by name.
        others: Number of files with another suffix or another name than the pattern, by key of the YAML file.
    """

    matched: dict[str, tuple[str, str]]
    images: dict[str, str]
    maps: dict[str, str]
    others: dict[str, int]


@dataclass(frozen=True)
class PairedFiles:
    """The patterns of images and of maps in a YAML file.

    Attributes:
        folder: Folder of the YAML file, to which paths are relative.
        images: Folder of the images, or a pattern such as rgb/{stem}.jpg.
        maps: Folder or pattern of the maps.
        key: Key of the YAML file that has the pattern of the maps.
        suffixes: Suffixes of maps, in lower case.
        noun: What a map is called in messages: "map", "mask".
        example: What to type to mark the names in the paths.
        leave_out: Real path of a folder to skip: the folder that is being written.
    """

    folder: Path
    images: str
    maps: str
    key: str
    suffixes: tuple[str, ...]
    noun: str
    example: str
    leave_out: Path | None = None

    def find(self) -> FilePairs:
        """Find images and maps and match them by name.

        Raises:
            ValueError: A folder does not exist, two images or two maps have one name, or no pair is found.
        """
        images = PathPattern.parse(self.images, "images", IMAGE_SUFFIXES)
        maps = PathPattern.parse(self.maps, self.key, self.suffixes)
        if images.groups != maps.groups:
            raise ValueError(
                f"images: {self.images} and {self.key}: {self.maps} must have the same {{names}}"
            )
        skipped = {os.path.realpath(self.folder / pattern.base) for pattern in (images, maps)}
        skipped |= {str(self.leave_out)} if self.leave_out else set()
        image_files, other_images = images.find(self.folder, skip=skipped)
        map_files, other_maps = maps.find(self.folder, skip=skipped)
        names = sorted(image_files.keys() & map_files.keys())
        if not names:
            raise ValueError(self._no_pairs_message(image_files, map_files))
        return FilePairs(
            {name: (image_files[name], map_files[name]) for name in names},
            {name: image_files[name] for name in sorted(image_files.keys() - map_files.keys())},
            {name: map_files[name] for name in sorted(map_files.keys() - image_files.keys())},
            {"images": other_images, self.key: other_maps},
        )

    def lines(self) -> Generator[str, None, dict[str, int]]:
        """Yield a line per name with its image and its map, either of which may be missing.

        Returns:
            Number of other files by key of the YAML file.
        """
        pairs = self.find()
        rows = {name: (name, *files) for name, files in pairs.matched.items()}
        rows |= {name: (name, image, "") for name, image in pairs.images.items()}
        rows |= {name: (name, "", path) for name, path in pairs.maps.items()}
        for name in sorted(rows):
            yield self.format_line(*rows[name])
        return {f"other files in {key}": count for key, count in pairs.others.items() if count}

    @staticmethod
    def format_line(name: str, image: str, path: str) -> str:
        """Return the line that `read` takes: a name and its files, one of which may be empty."""
        return "\t".join(map(escape_field, (name, image, path)))

    def read(self, line: str, decode: Callable[[Path], T], *, content: str) -> tuple[bytes, T]:
        """Read the image and the map of a line.

        Args:
            line: A line of `lines`.
            decode: Reads the file of the map.
            content: What a map holds, for messages: "depth", "mask".

        Returns:
            The bytes of the image file, and the map.

        Raises:
            ValueError: One of them is missing or cannot be read.
        """
        _, image, path = map(unescape_field, line.split("\t"))
        if not path:
            raise ValueError(f"no {content} of this name in {self.maps}")
        if not image:
            raise ValueError(f"no image of this name in {self.images}")
        try:
            data = read_bytes(self.folder / image)
        except ValueError as error:
            raise ValueError(f"its image: {error}") from error
        try:
            return data, decode(self.folder / path)
        except ValueError as error:
            raise ValueError(f"its {content}: {error}") from error

    def _no_pairs_message(self, images: Mapping[str, str], maps: Mapping[str, str]) -> str:
        for key, pattern, found, suffixes in (
            ("images", self.images, images, IMAGE_SUFFIXES),
            (self.key, self.maps, maps, self.suffixes),
        ):
            if not found:
                return f"{key}: {pattern} holds no matching file (looked for {' '.join(suffixes)})"
        image, path = (printable_path(files[min(files)]) for files in (images, maps))
        return (
            f"no image and {self.noun} have the same name: there are {len(images)} images, such as {image}, and "
            f"{len(maps)} {self.noun}s, such as {path}; mark the name in their paths, as in  {self.example}"
        )


@dataclass(frozen=True)
class PathPattern:
    """A pattern of paths with named parts, such as rgb/{stem}.jpg.

    Attributes:
        key: Key of the YAML file, for messages.
        base: Folder to search, the parts of the path before the first "{".
        groups: Sorted names of the parts in braces.
        expression: Matches a path below `base`.
    """

    key: str
    base: str
    groups: tuple[str, ...]
    expression: re.Pattern

    @classmethod
    def parse(cls, pattern: str, key: str, suffixes: tuple[str, ...]) -> "PathPattern":
        """Parse the value of `key`. A folder means FOLDER/{stem}; without a suffix any of `suffixes` matches."""
        pattern = os.path.expanduser(pattern)
        if "{" not in pattern:
            pattern = os.path.join(pattern, "{stem}")
        parts = pattern.split("/")
        fixed = next(number for number, part in enumerate(parts) if "{" in part)
        base, rest = "/".join(parts[:fixed]) or ("/" if fixed else ""), "/".join(parts[fixed:])
        base = "" if base == "." else base
        pieces = re.split(r"\{([a-z]\w*)\}", rest)
        groups = pieces[1::2]
        if len(set(groups)) != len(groups) or "stem" not in groups or "{" in "".join(pieces[::2]):
            raise ValueError(
                f"{key}: {pattern}: it must have {{stem}} once, as in  {key}: folder/{{stem}}{suffixes[0]}"
            )
        text = "".join(
            f"(?P<{piece}>{'.+' if piece == 'stem' else '[^/]+'})" if number % 2 else re.escape(piece)
            for number, piece in enumerate(pieces)
        )
        if not rest.lower().endswith(suffixes):
            text += f"(?i:{'|'.join(map(re.escape, suffixes))})"
        return cls(key, base, tuple(sorted(groups)), re.compile(text, re.DOTALL))

    def find(self, folder: Path, *, skip: set[str]) -> tuple[dict[str, str], int]:
        """Find the matching files below `folder`.

        Hidden files and folders, such as the ._ files of macOS, are ignored.

        Args:
            folder: Folder of the YAML file.
            skip: Real paths of folders to skip.

        Returns:
            The path of each file by name, and the number of files that do not match.

        Raises:
            ValueError: The folder does not exist or cannot be listed, or several files have one name.
        """
        top = folder / self.base
        if not top.is_dir():
            raise ValueError(f"{self.key}: {top} is not a folder")
        found: dict[str, list[str]] = {}
        others = 0

        def skip_folder(path: Path) -> bool:
            return path.name.startswith(".") or os.path.realpath(path) in skip

        for file, _ in walk_files(top, follow=True, skip_folder=skip_folder, files_first=True):
            if file.rpartition("/")[2].startswith("."):
                continue
            match = self.expression.fullmatch(file)
            if match is None:
                others += 1
                continue
            name = "/".join(match[group] for group in self.groups)
            found.setdefault(name, []).append(os.path.join(self.base, file))
        repeated = [paths for paths in found.values() if len(paths) > 1]
        if repeated:
            names = "; ".join(" and ".join(map(printable_path, paths)) for paths in repeated[:3])
            raise ValueError(
                f"{self.key}: {len(repeated)} names belong to several files each ({names}): choose one of them, "
                f"as in  {self.key}: {os.path.join(self.base, '{stem}')}{Path(repeated[0][0]).suffix}"
            )
        return {name: paths[0] for name, paths in found.items()}, others


def printable_path(path: str) -> str:
    """Return a path as valid Unicode, whatever bytes it consists of."""
    return path.encode("utf-8", "backslashreplace").decode()
