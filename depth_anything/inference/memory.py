"""Memory that mapping an image takes, how much is free, and what tells that there was too little."""

import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

BYTES_PER_PIXEL = 40
"""That mapping an image takes at most: decoded, resized, its map of its size, and what is written of it."""

NETWORK_BYTES_PER_PIXEL = 500
"""That a network takes at least on a CPU, per pixel that it sees: measured 594 for vits (1,540 px), 967 for vitb."""

LARGE_INPUT_PIXELS = 4_000_000
"""Pixels that a network sees from which on its memory is checked: less takes 2 GB at most."""

LARGE_IMAGE_PIXELS = 40_000_000
"""Images from this size on are decoded, and written, one at a time."""

_large_image_lock = threading.Lock()

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def check_image_memory(pixels: int) -> None:
    """Refuse an image that would take more memory than is free.

    Args:
        pixels: Of the image, by its header.

    Raises:
        ValueError: Says how much it takes and what is free.
    """
    need, free = pixels * BYTES_PER_PIXEL, free_memory() if pixels >= LARGE_IMAGE_PIXELS else None
    if free is not None and need > free:
        raise ValueError(
            f"its {pixels / 1e6:.0f} megapixels take some {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are "
            "free: reduce it first"
        )


def check_network_memory(seen: int) -> None:
    """Refuse an input size at which the network would take more memory than is free.

    Args:
        seen: Pixels of the image as the network sees it.

    Raises:
        ValueError: Says how much it takes and what is free.
    """
    need, free = seen * NETWORK_BYTES_PER_PIXEL, free_memory() if seen >= LARGE_INPUT_PIXELS else None
    if free is not None and need > free:
        raise ValueError(
            f"at this input size the network sees {seen / 1e6:.0f} megapixels, which take at least {need / 1e9:.0f} GB "
            f"of memory, and {free / 1e9:.1f} GB are free: take a smaller --input-size"
        )


def lock_large_image(pixels: int) -> AbstractContextManager[object]:
    """Return what threads hold while they work on an image, so that large ones take turns."""
    return _large_image_lock if pixels >= LARGE_IMAGE_PIXELS else nullcontext()


def free_memory() -> int | None:
    """Return the bytes that this process may still take, by the machine and its container; None if unknown."""
    known = [value for value in (_free_machine_memory(), _free_container_memory()) if value is not None]
    return min(known, default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception of NumPy, OpenCV or torch, on any device, says that memory does not suffice."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or (
        type(error).__module__.startswith(("torch", "cv2", "builtins"))
        and any(part in words for part in ("out of memory", "insufficient memory", "can't allocate memory"))
    )


def _free_machine_memory() -> int | None:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return None


def _free_container_memory() -> int | None:
    """What a container's limit leaves; files that it has read count as free, since they give way."""
    for limit, taken, word in (
        ("memory.max", "memory.stat", "anon"),
        ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"),
    ):
        try:
            most = int((_CGROUP / limit).read_text())
            stat = dict(line.split() for line in (_CGROUP / taken).read_text().splitlines())
            return max(most - int(stat[word]), 0)
        except (OSError, ValueError, KeyError):  # no such file, or no limit: "max"
            continue
    return None
