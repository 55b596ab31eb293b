"""What every benchmark is, and what their readers share: frames of an image file and its depth, errors, folders."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from depth_anything.data.sample import Frame, decode_image
from depth_anything.errors import UserError
from depth_anything.ingest.maps import read_bytes
from depth_anything.ingest.source import DatasetInfo


@dataclass(frozen=True)
class DepthLimits:
    """What a protocol compares on a benchmark.

    Attributes:
        min_depth: meters; nearer ground truth is not compared.
        max_depth: meters; farther ground truth is not compared.
        view_crop: the part of image and ground truth shown to the model, a name in `protocols.CROPS`, or "".
        eval_crop: the part of that in which pixels are compared, a name in `protocols.CROPS`, or "".
    """

    min_depth: float
    max_depth: float
    view_crop: str = ""
    eval_crop: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A public benchmark: facts and a reader.

    Attributes:
        name: as typed: `--benchmarks NAME`.
        title: its authors' name for it.
        images: number of images; 0: not published.
        layout: where its files are below the root.
        get: where to get it, and how large it is; begins with a URL.
        licence: SPDX name, or LicenseRef-….
        find: (root) → lines in a fixed order, one per frame, the key before the first tab. ValueError names what was
            looked for if the layout is not there.
        read: (root, line) → frame with depth in meters, NaN where unknown; of DA-2K, an image and its pairs of
            points. ValueError if a file is missing or damaged.
        depth_limits: protocol → what it compares; the first one is the default. Empty: pairs of points.
        sharp: whether the ground truth is dense and as sharp as the images, so that boundaries are scored too.
    """

    name: str
    title: str
    images: int
    layout: str
    get: str
    licence: str
    find: Callable[[Path], Iterable[str]]
    read: Callable[[Path, str], Any]
    depth_limits: Mapping[str, DepthLimits] = field(default_factory=dict)
    sharp: bool = False

    @classmethod
    def from_info(cls, info: DatasetInfo, **fields: Any) -> "Benchmark":
        """Make a benchmark from the facts of a set; `fields` add the reader, and replace facts."""
        facts = {"name": info.name, "title": info.title, "images": info.records, "layout": info.layout}
        return cls(**{**facts, "get": info.get, "licence": info.licence, **fields})

    @property
    def protocol(self) -> str:
        """The default protocol."""
        return next(iter(self.depth_limits), self.name)


@dataclass
class MaskedFrame(Frame):
    """A frame of which a part is evaluated: alignment uses all known pixels, errors only those of the mask.

    Attributes:
        eval_mask: bool, of the depth's size; None: all pixels.
    """

    eval_mask: np.ndarray | None = None


def make_frame(
    key: str,
    image: bytes | np.ndarray,
    depth: np.ndarray,
    *,
    known: np.ndarray | None = None,
    same_size: bool = True,
    meta: dict[str, Any] | None = None,
) -> Frame:
    """Make a frame of an image and its depth.

    Args:
        key: benchmark/name.
        image: the image file, or uint8 (H,W,3) RGB.
        depth: (h,w), meters; values that are not finite or not above zero are unknown.
        known: bool (h,w): where depth is known.
        same_size: whether the image must have the depth's size.
        meta: of the frame.

    Returns:
        A frame with float32 depth, NaN where unknown.

    Raises:
        ValueError: the image cannot be decoded, or sizes differ.
    """
    pixels = decode_image(image) if isinstance(image, bytes) else image
    if known is not None and known.shape != depth.shape:
        raise ValueError(f"its depth has {_format_size(depth)} pixels, its mask {_format_size(known)}")
    if same_size and pixels.shape[:2] != depth.shape:
        raise ValueError(f"its image has {_format_size(pixels)} pixels, its depth {_format_size(depth)}")
    valid = np.isfinite(depth) & (depth > 0)
    if known is not None:
        valid &= known
    meters = np.where(valid, depth, np.nan).astype(np.float32)
    return Frame(key, pixels, {"unit": "m", **(meta or {})}, depth=meters)


def read_label_image(data: bytes) -> np.ndarray:
    """Decode a mask or the classes of pixels from a gray image of 8 bits or 1 bit.

    Returns:
        uint8 (H,W): the stored values; 0 and 255 of 1 bit.

    Raises:
        ValueError: it cannot be decoded, has colors, or is a 16-bit PNG.
    """
    pixels = decode_image(data)
    if (pixels != pixels[..., :1]).any() or (data.startswith(b"\x89PNG") and data[24] > 8):
        raise ValueError("a gray image of 8 bits is needed, but this one has colors or 16 bits")
    return pixels[..., 0]


@contextmanager
def prefix_errors(name: str) -> Iterator[None]:
    """Put the name of a frame or file before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def read_file(root: Path, path: str) -> bytes:
    """Read a file below the root; a ValueError begins with its path."""
    with prefix_errors(path):
        return read_bytes(root / path)


def require_lines(lines: Iterator[str], what: str, fix: str) -> Iterator[str]:
    """Yield lines; UserError with this text if there is none."""
    first = next(lines, None)
    if first is None:
        raise UserError(what, fix)
    yield first
    yield from lines


def resolve_root(root: Path, folder: str = "") -> Path:
    """The folder of a benchmark: `root/folder` if it exists, else `root` itself.

    Several benchmarks of the same files are thus also found below the folder of all benchmarks.

    Raises:
        ValueError: `root` is not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"{root} is not a folder: type the path of the folder that holds the unpacked benchmark"
        )
    return root / folder if folder and (root / folder).is_dir() else root


def _format_size(values: np.ndarray) -> str:
    return f"{values.shape[1]} x {values.shape[0]}"
