"""Maps that any program made before, judged as a model's: a folder with a file an image, found by name."""

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

from depth_anything.data.sample import Frame
from depth_anything.ingest import maps
from depth_anything.ingest.find_files import walk_files

MAP_SUFFIXES = (".npy", ".png", ".exr")

_QUANTITY_ENDINGS = {"_disparity": "disparity", "_depth": "depth", "_raw_depth_meter": "depth"}
"""What `depth-anything predict` and the authors' metric script put behind a name, and what it says."""


class PrecomputedMaps:
    """A folder of maps with a predictor's interface: asked for a frame, it reads the file of that frame's name.

    Files are `.npy`, 16-bit `.png` with the text that `depth-anything predict` writes (`low`, `high`), or `.exr`.
    What they hold is said by that text, by the header of the EXR, by NAME.json beside it, by the name
    (`NAME_disparity`, `NAME_depth`, the authors' `NAME_raw_depth_meter`) or, if nothing else, by the caller.

    Attributes:
        folder: where they lie.
        quantity: "disparity" or "depth", of all of them.
    """

    def __init__(self, folder: str | Path, *, quantity: str | None = None) -> None:
        """List the folder; files are read when they are asked for.

        Args:
            folder: searched through.
            quantity: what the maps are, where they do not say it themselves.

        Raises:
            ValueError: no such folder, no map in it, or what the maps are is not said, or said differently.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"no predictions: {folder} is not a folder")
        files = [
            path
            for _, path in walk_files(self.folder, follow=True)
            if path and path.suffix.lower() in MAP_SUFFIXES and path.is_file()
        ]
        said = {file: read_quantity(file) for file in files}
        # A coloured picture beside the values is no map, nor is an 8-bit copy of one.
        files = [f for f in files if f.suffix.lower() != ".png" or _header_texts(f).get("low")]
        if not files:
            raise ValueError(
                f"no predictions: {folder} holds no {', '.join(MAP_SUFFIXES)} with a map's values"
            )
        self.quantity = self._one_quantity({f: said[f] for f in files}, quantity)
        self._files = files
        self._paths: dict[str, list[Path]] = {}
        for file in files:
            for name in _path_endings(
                _strip_quantity_ending(file.relative_to(self.folder).with_suffix("").as_posix())
            ):
                self._paths.setdefault(name, []).append(file)
        self._taken: dict[tuple[str, Path], str] = {}

    def load_map(self, frame: Frame) -> np.ndarray:
        """Read the map of a frame, float32 (h,w).

        It is looked for by the frame's key and by the names of the files it was made of: the one file whose path
        ends as one of them does, in as many parts as can be.

        Raises:
            ValueError: no file, several, a damaged one, or one that was read for another frame of the set.
        """
        whole = [frame.key, str(frame.meta.get("name", "")), *frame.meta.get("files", [])]
        names = [
            end
            for name in whole
            for other in (name, _drop_extension(name))
            for end in _path_endings(other)
            if end
        ]
        names.sort(key=lambda name: -name.count("/"))
        several: list[Path] = []
        for name in dict.fromkeys(names):
            files = self._paths.get(name, [])
            if found := self._best(files):
                return self._read(self._own(found, frame.key))
            several = several or files
        if several:
            raise ValueError(
                f"no prediction of {frame.key!r} in {self.folder} that can be told from others: "
                f"{several[0]} and {several[-1]} have its name"
            )
        raise ValueError(
            f"no prediction of {frame.key!r} in {self.folder}: a file "
            f"{_drop_extension(frame.key)}{MAP_SUFFIXES[0]} is needed, "
            "or one called as its image"
        )

    def _own(self, file: Path, key: str) -> Path:
        """The file, unless it was another frame's of the same set: sequences count their frames alike."""
        taken = self._taken.setdefault((key.partition("/")[0], file), key)
        if taken != key:
            raise ValueError(
                f"{file} would be the prediction of {taken!r} and of {key!r}: put the maps into folders, as the "
                "images lie"
            )
        return file

    @property
    def fingerprint(self) -> str:
        """A digest of all files' names, sizes and times: another one means that something was written anew."""
        digest = hashlib.sha256()
        for file in self._files:
            about = file.stat()
            name = file.relative_to(self.folder).as_posix()
            digest.update(f"{name}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
        return f"sha256:{digest.hexdigest()}"

    def __len__(self) -> int:
        """How many files there are."""
        return len(self._files)

    def _one_quantity(self, said: dict[Path, str | None], given: str | None) -> str:
        quantities = {quantity for quantity in said.values() if quantity}
        if len(quantities) > 1:
            raise ValueError(f"{self.folder} holds maps of disparity and of depth: give a folder for each")
        if given and quantities and quantities != {given}:
            raise ValueError(f"the maps in {self.folder} say that they are {quantities.pop()}, not {given}")
        if not (quantities or given):
            raise ValueError(
                f"the maps in {self.folder} do not say what they are: add --quantity disparity (larger is "
                "nearer) or --quantity depth (metres)"
            )
        return quantities.pop() if quantities else str(given)

    @staticmethod
    def _best(files: list[Path]) -> Path | None:
        """One file of those with a name; of one map in several formats the most exact one."""
        if len({_strip_quantity_ending(file.with_suffix("").as_posix()) for file in files}) != 1:
            return None  # nothing, or images of one name in several folders
        return min(files, key=lambda file: ((".npy", ".exr", ".png").index(file.suffix.lower()), file))

    @staticmethod
    def _read(file: Path) -> np.ndarray:
        try:
            values = maps.read_map(file).astype(np.float32)
            if file.suffix.lower() == ".png":
                text = _header_texts(file)
                low, high = float(text["low"]), float(text["high"])
                values = (low + values.astype(np.float64) / 65535 * (high - low)).astype(np.float32)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{file}: {error}") from error
        return values


def read_quantity(file: Path) -> str | None:
    """What a map's file says that it holds, "disparity" or "depth"; None if it does not."""
    said = _header_texts(file).get("quantity")
    stem = file.stem
    mark = next((mark for mark in _QUANTITY_ENDINGS if stem.endswith(mark)), "")
    if said is None and mark:
        said = _QUANTITY_ENDINGS[mark]
    beside = file.with_name(f"{stem.removesuffix(mark)}.json")
    if said is None and beside.is_file():
        try:
            said = json.loads(beside.read_bytes()).get("quantity")
        except (ValueError, AttributeError):
            said = None
    return said if said in ("disparity", "depth") else None


def _header_texts(file: Path) -> dict[str, str]:
    """The texts in the header of a PNG or an EXR; none where there are none, or it is damaged."""
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
    return next((name.removesuffix(mark) for mark in _QUANTITY_ENDINGS if name.endswith(mark)), name)


def _path_endings(name: str) -> list[str]:
    """A path's ends, the longest first: a/b/c, b/c, c."""
    parts = name.split("/")
    return ["/".join(parts[first:]) for first in range(len(parts))]


def _drop_extension(name: str) -> str:
    head, slash, last = name.rpartition("/")
    return f"{head}{slash}{last.rpartition('.')[0] or last}"
