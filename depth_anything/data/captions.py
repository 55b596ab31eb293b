"""Captions of images: the field `txt` of a record, one caption a line, as WebDataset's image and text pairs have it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from depth_anything.data.stream import CAPTION, random_uint64

CAPTION_FIELD = "txt"

CAPTION_BYTES = 2048
"""Bytes of a caption in a batch. A CLIP prompt ends after 77 tokens, which take a few hundred bytes."""


def encode_captions(captions: Sequence[str]) -> bytes:
    """Encode captions as the field of a record: UTF-8, a line each, white space collapsed, empty ones left out.

    >>> encode_captions(["A  red\\ncar ", "", "a street"])
    b'A red car\\na street'
    """
    lines = (" ".join(caption.split()) for caption in captions)
    return "\n".join(line for line in lines if line).encode("utf-8", "replace")


def read_captions(fields: Mapping[str, bytes], meta: Mapping[str, Any]) -> list[str]:
    """Read the captions of a record: the lines of `txt`, else `caption` of its json, as img2dataset writes it.

    Returns:
        At least one caption, none of them empty.

    Raises:
        ValueError: There is no caption, or it is not UTF-8.
    """
    text: Any = meta.get("caption")
    if CAPTION_FIELD in fields:
        try:
            text = fields[CAPTION_FIELD].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{CAPTION_FIELD}: not UTF-8 ({error.reason})") from error
    lines = [" ".join(line.split()) for line in text.splitlines()] if isinstance(text, str) else []
    captions = [line for line in lines if line]
    if not captions:
        raise ValueError("no caption: the record has no text in `txt`, nor a caption in its json")
    return captions


def draw_caption(captions: Sequence[str], *, seed: int, n: int) -> str:
    """Choose the caption of sample `n` among those of its image."""
    return captions[int(random_uint64(seed, n, 1, purpose=CAPTION)[0] % np.uint64(len(captions)))]


def write_caption(caption: str, out: np.ndarray) -> None:
    """Write a caption as UTF-8 into `out`, uint8 (CAPTION_BYTES,); zeros follow, and what is too long is cut off."""
    data = caption.encode("utf-8", "replace")[: len(out)].decode("utf-8", "ignore").encode()
    out[: len(data)] = np.frombuffer(data, np.uint8)
    out[len(data) :] = 0


def caption_texts(captions: np.ndarray) -> list[str]:
    """Return the captions of a batch, uint8 (B, CAPTION_BYTES)."""
    return [row.tobytes().rstrip(b"\0").decode("utf-8", "replace") for row in captions]
