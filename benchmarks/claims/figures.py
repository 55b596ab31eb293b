"""The file of a network's figures: {"version", "digest" of the weights, "sets": [{"test", "set", "images", …}]}."""

import hashlib
import json
from pathlib import Path
from typing import Any

FIGURES_VERSION = 2
"""Increase it when the figures of a network change; they are cached by it."""


def read_figures(path: Path, digest: str | None = None) -> list[dict[str, Any]]:
    """Read the figures of a network; [] if there are none, or not of this version and (if given) these weights."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    if not isinstance(content, dict) or content.get("version") != FIGURES_VERSION:
        return []
    same = digest is None or content.get("digest") == digest
    return content["sets"] if same and isinstance(content.get("sets"), list) else []


def row_key(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return what a row was measured on: test, set, and digest of its shards."""
    return row["test"], row["set"], row["images_digest"]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file of weights."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
