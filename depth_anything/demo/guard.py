"""Middleware of the web demo: a quota on uploads, and an alias that hides the server's temporary folder."""

import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MIN_AGE_S = 30  # younger files may still be written or read


@dataclass(frozen=True)
class UploadQuota:
    """Limits on the temporary folder; the oldest uploads are removed to stay within them.

    Attributes:
        folder: The temporary folder. Each upload, and each result, is a folder in it.
        files: Maximum number of uploads and results.
        bytes: Maximum size of all of them.
    """

    folder: Path
    files: int
    bytes: int

    def make_room(self, size: int, *, keep: Path | None = None) -> bool:
        """Remove the oldest entries until a new one fits; return whether it does.

        Args:
            size: Bytes of the new entry.
            keep: A file that is in use and must not be removed.
        """
        entries = sorted(self._entries(), key=lambda entry: entry[0])
        files, total = len(entries), sum(entry[1] for entry in entries)
        for modified, entry_size, path in entries:
            if files < self.files and total + size <= self.bytes:
                return True
            recent = time.time() - modified < _MIN_AGE_S
            if recent or (keep is not None and keep.is_relative_to(path)):
                continue
            shutil.rmtree(path, ignore_errors=True)
            files, total = files - 1, total - entry_size
        return files < self.files and total + size <= self.bytes

    def _entries(self) -> list[tuple[float, int, Path]]:
        """List each entry's time of last modification, size in bytes, and path."""
        entries = []
        for path in self.folder.iterdir():
            modified, size = 0.0, 0
            for file in (path, *path.rglob("*")):
                with suppress(OSError):  # removed meanwhile
                    status = file.stat()
                    modified = max(modified, status.st_mtime)
                    size += status.st_size if file.is_file() else 0
            entries.append((modified, size, path))
        return entries


class UploadGuard:
    """ASGI middleware that refuses an upload which is too large, states no size, or does not fit the quota."""

    def __init__(self, app: Any, quota: UploadQuota, max_bytes: int) -> None:
        """Wrap an app; `max_bytes` is the maximum size of one upload."""
        self._app, self._quota, self._max_bytes = app, quota, max_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it with 413 (too large) or 507 (quota exceeded)."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith("/upload"):
            length = dict(scope["headers"]).get(b"content-length", b"")
            size = int(length) if length.isdigit() else self._max_bytes + 1
            status = 413 if size > self._max_bytes else 0 if self._quota.make_room(size) else 507
            if status:
                await _send_empty(send, status)
                return
        await self._app(scope, receive, send)


class FolderAlias:
    """ASGI middleware that replaces the path of the temporary folder by an alias in everything it sends.

    The alias has the length of the path, so content lengths stay valid. Requests for files at a URL are refused.
    """

    def __init__(self, app: Any, folder: str) -> None:
        """Wrap an app and draw a random alias for `folder`."""
        self._app, self._path = app, folder.encode()
        self._alias = f"/{secrets.token_hex(len(folder))}"[: len(folder)].encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Replace the alias by the path in the request, and the path by the alias in the response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if "file=http" in scope["path"]:
            await _send_empty(send, 403)
            return
        headers = dict(scope["headers"])
        inner = {**scope, "path": scope["path"].replace(self._alias.decode(), self._path.decode())}
        for key in ("raw_path", "query_string"):
            inner[key] = (scope.get(key) or b"").replace(self._alias, self._path)
        request_is_text = b"multipart" not in headers.get(b"content-type", b"")
        response_is_text = False

        async def receive_inner() -> Any:
            message = await receive()
            if request_is_text and message.get("body"):
                message = {**message, "body": message["body"].replace(self._alias, self._path)}
            return message

        async def send_aliased(message: Any) -> None:
            nonlocal response_is_text
            if message["type"] == "http.response.start":
                kind = dict(message["headers"]).get(b"content-type", b"")
                response_is_text = kind.startswith((b"text/", b"application/json"))
                aliased = [(key, value.replace(self._path, self._alias)) for key, value in message["headers"]]
                message = {**message, "headers": aliased}
            elif response_is_text and message.get("body"):
                message = {**message, "body": bytes(message["body"]).replace(self._path, self._alias)}
            await send(message)

        await self._app(inner, receive_inner, send_aliased)


async def _send_empty(send: Any, status: int) -> None:
    """Answer a request with a status and no body."""
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})
