"""Scores of single images cached on disk, so that an evaluation can be stopped, continued and shared by processes."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Share = tuple[int, int]
"""(k, n): the k-th of n shares, from 1."""


class RowCache:
    """The rows of one model on one benchmark: a file per writing process, a JSON line per row.

    A file's name begins with a digest of everything that its rows depend on, so rows of other settings are not found.
    Files written on other machines can be copied into the folder.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], *, share: Share = (1, 1)) -> None:
        """Name the files; nothing is written yet.

        Args:
            folder: of the rows.
            settings: what the rows depend on: model, images, protocol, ….
            share: which process writes, of how many.
        """
        self.folder = Path(folder)
        self._header = json.dumps(settings, sort_keys=True, default=str)
        self._digest = hashlib.sha256(self._header.encode()).hexdigest()[:16]
        self._path = self.folder / f"{self._digest}-{share[0]}of{share[1]}.jsonl"

    def load(self) -> dict[str, dict[str, Any]]:
        """Read the rows that any process has written: the benchmark's line → row. Truncated lines are ignored."""
        rows: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob(f"{self._digest}-*.jsonl")):
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(text)
                    rows[entry["line"]] = entry["row"]
                except (ValueError, KeyError, TypeError):
                    continue  # the process was killed while it wrote
        return rows

    def add(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Append rows: the benchmark's line → row."""
        self.folder.mkdir(parents=True, exist_ok=True)
        header = "" if self._path.exists() and self._path.stat().st_size else self._header
        texts = [json.dumps({"line": line, "row": row}) for line, row in rows.items()]
        with self._path.open("a", encoding="utf-8") as file:
            # The line break ends a line that was truncated.
            file.write(header + "\n" + "\n".join(texts) + "\n")
