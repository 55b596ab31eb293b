"""What the readers of benchmarks share: a frame of an image file and its depth, and which lines are listed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from depth_anything.data.sample import Frame, decode_image
from depth_anything.errors import UserError
from depth_anything.ingest.maps import read_bytes


@dataclass
class MaskedFrame(Frame):
    """A frame of which a part is compared: fits are over all that is known, errors over what of it is in the part.

    Attributes:
        part: bool, of the depth's size; None: all.
    """

    part: np.ndarray | None = None


def make_frame(
    key: str,
    image: bytes | np.ndarray,
    depth: np.ndarray,
    *,
    known: np.ndarray | None = None,
    same_size: bool = True,
    meta: dict[str, Any] | None = None,
) -> Frame:
    """Make a frame of what a benchmark's files hold.

    Args:
        key: benchmark/name.
        image: The image file, or uint8 (H, W, 3) RGB.
        depth: (h, w), metres; what is not finite or not above zero is not known.
        known: bool (h, w): what else must hold of a known pixel.
        same_size: The image must be of the depth's size.
        meta: For the frame.

    Returns:
        A frame with float32 depth, NaN where it is not known.

    Raises:
        ValueError: If the image cannot be decoded, or sizes differ.
    """
    pixels = decode_image(image) if isinstance(image, bytes) else image
    if known is not None and known.shape != depth.shape:
        raise ValueError(f"its depth has {_format_size(depth)} pixels, the mask of it {_format_size(known)}")
    if same_size and pixels.shape[:2] != depth.shape:
        raise ValueError(f"its image has {_format_size(pixels)} pixels, its depth {_format_size(depth)}")
    good = np.isfinite(depth) & (depth > 0)
    if known is not None:
        good &= known
    return Frame(
        key, pixels, {"unit": "m", **(meta or {})}, depth=np.where(good, depth, np.nan).astype(np.float32)
    )


def read_label_image(data: bytes) -> np.ndarray:
    """Decode a mask, or classes of pixels, from a grey image of 8 bits or of one.

    Returns:
        uint8 (H, W): what is stored, or 0 and 255 where that is one bit.

    Raises:
        ValueError: If it cannot be decoded, is in colours, or a PNG of 16 bits.
    """
    pixels = decode_image(data)
    if (pixels != pixels[..., :1]).any() or (data.startswith(b"\x89PNG") and data[24] > 8):
        raise ValueError("a grey image of 8 bits is needed, and this one is in colours or has 16")
    return pixels[..., 0]


@contextmanager
def prefix_errors(key: str) -> Iterator[None]:
    """Name the frame in what is said of its files: a ValueError begins with its key."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


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
    """The folder of a benchmark: the one called `folder` in `root`, if there is one, or else `root` itself.

    Several benchmarks of the same files are thus found below the folder of all benchmarks, too.

    Raises:
        ValueError: If there is none.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"{root} is not a folder: type the path of the folder that the benchmark was unpacked to"
        )
    return root / folder if folder and (root / folder).is_dir() else root


def _format_size(values: np.ndarray) -> str:
    return f"{values.shape[1]} x {values.shape[0]}"
