"""Rows kept on disk as they come, so that a judgement that was stopped goes on, and several processes share one."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Share = tuple[int, int]
"""(k, n): the k-th of n shares, counted from 1."""


class RowCache:
    """The rows of one model on one benchmark: a file for each process that writes, a line a row.

    A file's name begins with a digest of all that its rows depend on: what was judged otherwise is not seen.
    Files of other machines may be put beside these.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any], *, part: Share = (1, 1)) -> None:
        """Name the files; nothing is written yet.

        Args:
            folder: of the rows.
            about: what the rows depend on: model, images, protocol, ….
            part: whose file is written.
        """
        self.folder = Path(folder)
        self._about = json.dumps(about, sort_keys=True, default=str)
        self._digest = hashlib.sha256(self._about.encode()).hexdigest()[:16]
        self._path = self.folder / f"{self._digest}-{part[0]}of{part[1]}.jsonl"

    def load(self) -> dict[str, dict[str, Any]]:
        """Read all rows that any process has kept: the benchmark's line → row. A line cut short is left out."""
        rows: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob(f"{self._digest}-*.jsonl")):
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    kept = json.loads(text)
                    rows[kept["line"]] = kept["row"]
                except (ValueError, KeyError, TypeError):
                    continue  # of a process that was killed while it wrote
        return rows

    def add(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Append rows by their lines."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = not self._path.exists() or not self._path.stat().st_size
        texts = [json.dumps({"line": line, "row": row}) for line, row in rows.items()]
        with self._path.open("a", encoding="utf-8") as file:
            # The empty line ends one that was cut short.
            file.write((self._about if new else "") + "\n" + "\n".join(texts) + "\n")
