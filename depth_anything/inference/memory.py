"""Memory checks of inference: what an image needs, what is free, and whether an exception means out of memory."""

import threading
from contextlib import AbstractContextManager, nullcontext

from depth_anything.errors import UserError
from depth_anything.host_memory import free_memory

BYTES_PER_PIXEL = 40
"""Upper bound of the memory per image pixel: decoding, resizing, the map at full size and its encoded files."""

NETWORK_BYTES_PER_PIXEL = 500
"""Lower bound of the memory per input pixel on a CPU; measured: 594 for vits (at 1,540 px), 967 for vitb."""

LARGE_INPUT_PIXELS = 4_000_000
"""Network inputs from this size on are checked; smaller ones take at most 2 GB."""

LARGE_IMAGE_PIXELS = 40_000_000
"""Images from this size on are decoded and written one at a time."""

_large_image_lock = threading.Lock()


def check_image_memory(pixels: int) -> None:
    """Refuse an image that needs more memory than is free.

    Args:
        pixels: Height times width, as the image's header states them.

    Raises:
        ValueError: Names the memory needed and the memory free.
    """
    need, free = pixels * BYTES_PER_PIXEL, free_memory() if pixels >= LARGE_IMAGE_PIXELS else None
    if free is not None and need > free:
        raise UserError(
            f"its {pixels / 1e6:.0f} megapixels need about {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are "
            "free",
            "reduce it first",
        )


def check_network_memory(pixels: int) -> None:
    """Refuse an input size at which the network needs more memory than is free.

    Args:
        pixels: Height times width of the network's input.

    Raises:
        ValueError: Names the memory needed and the memory free.
    """
    need, free = pixels * NETWORK_BYTES_PER_PIXEL, free_memory() if pixels >= LARGE_INPUT_PIXELS else None
    if free is not None and need > free:
        raise UserError(
            f"at this input size the network gets {pixels / 1e6:.0f} megapixels, which need at least "
            f"{need / 1e9:.0f} GB of memory, and {free / 1e9:.1f} GB are free",
            "choose a smaller --input-size",
        )


def lock_large_image(pixels: int) -> AbstractContextManager[object]:
    """Return a context manager in which only one large image is processed at a time."""
    return _large_image_lock if pixels >= LARGE_IMAGE_PIXELS else nullcontext()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception of NumPy, OpenCV or torch (any device) means that memory ran out."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or (
        type(error).__module__.startswith(("torch", "cv2", "builtins"))
        and any(part in message for part in ("out of memory", "insufficient memory", "can't allocate memory"))
    )
