"""Maps that any program predicted before: a folder with one file per image, found by name."""

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

from depth_anything.data.sample import Frame
from depth_anything.errors import Argument, UserError
from depth_anything.ingest import maps
from depth_anything.ingest.find_files import walk_files

MAP_SUFFIXES = (".npy", ".exr", ".png")
"""Suffixes of maps, the most exact format first."""

MAX_ASPECT_RATIO = 1.03
"""How much the aspect ratio of a map may differ from its image's; rounding to patches changes it by a few percent."""

_QUANTITY_ENDINGS = {"_disparity": "disparity", "_depth": "depth", "_raw_depth_meter": "depth"}
"""Endings that `depth-anything predict` and the authors' metric script append to a name → quantity."""


class PrecomputedMaps:
    """A folder of maps that is evaluated like a model: it returns the file named as a frame.

    Files are `.npy`, `.exr` or 16-bit `.png` with the text that `depth-anything predict` writes (`low`, `high`). Their
    quantity is read from that text, the EXR header, NAME.json in the same folder, or the name (`NAME_disparity`,
    `NAME_depth`, the authors' `NAME_raw_depth_meter`); else the caller must give it.

    Attributes:
        folder: the folder.
        quantity: "disparity" or "depth", of all maps.
    """

    def __init__(self, folder: str | Path, *, quantity: str | None = None) -> None:
        """List the folder; files are read on demand.

        Args:
            folder: searched recursively.
            quantity: quantity of the maps, if the files do not say it.

        Raises:
            UserError: no such folder, no map in it, or the quantity is unknown or contradictory.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"no predictions: {folder} is not a folder")
        self._files = [
            path
            for _, path in walk_files(self.folder, follow=True)
            if path and path.suffix.lower() in MAP_SUFFIXES and path.is_file() and _has_values(path)
        ]
        if not self._files:
            raise UserError(
                f"no predictions: {folder} holds no {', '.join(MAP_SUFFIXES)} with a map's values"
            )
        self.quantity = self._find_quantity(quantity)
        self._by_name: dict[str, list[Path]] = {}
        for file in self._files:
            path = file.relative_to(self.folder).with_suffix("").as_posix()
            for name in _path_endings(_strip_quantity_ending(path)):
                self._by_name.setdefault(name, []).append(file)
        self._frame_of: dict[tuple[str, Path], str] = {}

    def load_map(self, frame: Frame) -> np.ndarray:
        """Load the map of a frame, float32 (h,w).

        It is found by the frame's key and by the names of the files it was read from: the one file whose path ends
        like one of them, in as many parts as possible.

        Raises:
            ValueError: no file, several, a damaged one, or one that was loaded for another frame of the set.
        """
        paths = [frame.key, str(frame.meta.get("name", "")), *frame.meta.get("files", [])]
        names = [
            name for path in paths for p in (path, _drop_extension(path)) for name in _path_endings(p) if name
        ]
        names.sort(key=lambda name: -name.count("/"))
        ambiguous: list[Path] = []
        for name in dict.fromkeys(names):
            files = self._by_name.get(name, [])
            if len({_strip_quantity_ending(file.with_suffix("").as_posix()) for file in files}) == 1:
                # The same map in several formats: load the most exact one.
                file = min(files, key=lambda file: (MAP_SUFFIXES.index(file.suffix.lower()), file))
                owner = self._frame_of.setdefault((frame.key.partition("/")[0], file), frame.key)
                if owner != frame.key:
                    raise ValueError(
                        f"{file} matches {owner!r} and {frame.key!r}: put the maps into folders as the images are"
                    )
                return _read_values(file)
            ambiguous = ambiguous or files
        if ambiguous:
            raise ValueError(
                f"no prediction of {frame.key!r} in {self.folder}: {ambiguous[0]} and {ambiguous[-1]} have its name"
            )
        raise ValueError(
            f"no prediction of {frame.key!r} in {self.folder}: add a file {_drop_extension(frame.key)}.npy, or one "
            "named as its image"
        )

    @property
    def fingerprint(self) -> str:
        """A digest of all files' names, sizes and times, which changes when a file is rewritten."""
        digest = hashlib.sha256()
        for file in self._files:
            stat = file.stat()
            name = file.relative_to(self.folder).as_posix()
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return f"sha256:{digest.hexdigest()}"

    @property
    def files(self) -> list[Path]:
        """The files, in the order of the folder's listing."""
        return list(self._files)

    def __len__(self) -> int:
        """The number of files."""
        return len(self._files)

    def _find_quantity(self, given: str | None) -> str:
        quantities = {quantity for file in self._files if (quantity := read_quantity(file))}
        if len(quantities) > 1:
            raise UserError(f"{self.folder} holds maps of disparity and of depth", "use a folder for each")
        if given and quantities and quantities != {given}:
            raise UserError(
                f"the maps in {self.folder} are {quantities.pop()} by their files, not {given}",
                ["leave out ", Argument("quantity", given)],
            )
        if not (quantities or given):
            raise UserError(
                f"the quantity of the maps in {self.folder} is unknown",
                [
                    "add ",
                    Argument("quantity", "disparity"),
                    " (larger is nearer) or ",
                    Argument("quantity", "depth"),
                    " (meters)",
                ],
            )
        return quantities.pop() if quantities else str(given)


def read_quantity(file: Path) -> str | None:
    """The quantity of a map by its header, its name or NAME.json: "disparity", "depth", or None if unknown."""
    quantity = _header_texts(file).get("quantity")
    ending = next((ending for ending in _QUANTITY_ENDINGS if file.stem.endswith(ending)), "")
    if quantity is None and ending:
        quantity = _QUANTITY_ENDINGS[ending]
    sidecar = file.with_name(f"{file.stem.removesuffix(ending)}.json")
    if quantity is None and sidecar.is_file():
        try:
            quantity = json.loads(sidecar.read_bytes()).get("quantity")
        except (ValueError, AttributeError):
            quantity = None
    return quantity if quantity in ("disparity", "depth") else None


def check_aspect(map_: np.ndarray, frame: Frame) -> None:
    """Check that a map has the aspect ratio of its image: otherwise it is transposed, cropped or of another image.

    Raises:
        ValueError: the ratio differs by more than `MAX_ASPECT_RATIO`.
    """
    (height, width), (rows, columns) = map_.shape, frame.image.shape[:2]
    ratio = (width / height) / (columns / rows)
    if not 1 / MAX_ASPECT_RATIO <= ratio <= MAX_ASPECT_RATIO:
        raise ValueError(
            f"the map of {frame.key!r} is {width}x{height} and its image {columns}x{rows}: a map may be smaller or "
            "larger than its image, but must have its aspect ratio"
        )


def _has_values(file: Path) -> bool:
    """Whether a file holds values; a PNG without the text "low" is a picture, or an 8-bit copy of a map."""
    return file.suffix.lower() != ".png" or bool(_header_texts(file).get("low"))


def _read_values(file: Path) -> np.ndarray:
    try:
        values = maps.read_map(file).astype(np.float32)
        if file.suffix.lower() == ".png":
            texts = _header_texts(file)
            low, high = float(texts["low"]), float(texts["high"])
            values = (low + values.astype(np.float64) / 65535 * (high - low)).astype(np.float32)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file}: {error}") from error
    return values


def _header_texts(file: Path) -> dict[str, str]:
    """The texts in the header of a PNG or EXR file; empty for other files and damaged ones."""
    try:
        if file.suffix.lower() == ".exr":
            return maps.read_exr_strings(file)
        if file.suffix.lower() != ".png":
            return {}
        with Image.open(file) as picture:
            return dict(getattr(picture, "text", {})) if picture.mode.startswith("I") else {}
    except (OSError, ValueError):
        return {}


def _strip_quantity_ending(name: str) -> str:
    return next((name.removesuffix(end) for end in _QUANTITY_ENDINGS if name.endswith(end)), name)


def _path_endings(path: str) -> list[str]:
    """The endings of a path, longest first: a/b/c, b/c, c."""
    parts = path.split("/")
    return ["/".join(parts[first:]) for first in range(len(parts))]


def _drop_extension(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.rpartition('.')[0] or name}"
