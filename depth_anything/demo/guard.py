"""What stands between a visitor and the page: an alias for its folder, and a quota for what lies in it."""

import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MIN_AGE_S = 30  # what is younger may still be written, or mapped


@dataclass(frozen=True)
class UploadQuota:
    """What may lie in the folder of temporary files.

    Attributes:
        folder: Its path.
        files: How many uploads, and maps of them.
        bytes: Of all of them.
    """

    folder: Path
    files: int
    bytes: int

    def make_room(self, coming: int, *, keep: Path | None = None) -> bool:
        """Remove the oldest until there is room; return whether there is.

        Args:
            coming: Bytes that are about to be written.
            keep: A file that is in use.
        """
        held = sorted(self._entries(), key=lambda entry: entry[0])
        files, size = len(held), sum(entry[1] for entry in held)
        for changed, bytes_, path in held:
            if files < self.files and size + coming <= self.bytes:
                return True
            fresh = time.time() - changed < _MIN_AGE_S
            if fresh or (keep is not None and keep.is_relative_to(path)):
                continue
            shutil.rmtree(path, ignore_errors=True)
            files, size = files - 1, size - bytes_
        return files < self.files and size + coming <= self.bytes

    def _entries(self) -> list[tuple[float, int, Path]]:
        """Per folder of the folder: when it was last written to, its bytes, its path."""
        found = []
        for path in self.folder.iterdir():
            changed, size = 0.0, 0
            for file in (path, *path.rglob("*")):
                with suppress(OSError):  # gone meanwhile
                    about = file.stat()
                    changed = max(changed, about.st_mtime)
                    size += about.st_size if file.is_file() else 0
            found.append((changed, size, path))
        return found


class UploadGuard:
    """Refuses an upload that is too large, does not say its size, or for which there is no room."""

    def __init__(self, app: Any, quota: UploadQuota, most_bytes: int) -> None:
        """Take what may lie on the disk, and the bytes of one upload at most."""
        self._app, self._quota, self._most = app, quota, most_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it with 413 (too large) or 507 (no room)."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith("/upload"):
            said = dict(scope["headers"]).get(b"content-length", b"")
            size = int(said) if said.isdigit() else self._most + 1
            status = 413 if size > self._most else 0 if self._quota.make_room(size) else 507
            if status:
                await send({"type": "http.response.start", "status": status, "headers": []})
                await send({"type": "http.response.body", "body": b""})
                return
        await self._app(scope, receive, send)


class FolderAlias:
    """Shows another name for the folder of temporary files than it has on the server's disk.

    The alias is as long as the name, so that lengths of responses stay; and no address is fetched for anyone.
    """

    def __init__(self, app: Any, folder: str) -> None:
        """Choose an alias for a folder."""
        self._app, self._real = app, folder.encode()
        self._alias = f"/{secrets.token_hex(len(folder))}"[: len(folder)].encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on with the folder's name, and its answer with the alias."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if "file=http" in scope["path"]:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        headers = dict(scope["headers"])
        wanted = {**scope, "path": scope["path"].replace(self._alias.decode(), self._real.decode())}
        for key in ("raw_path", "query_string"):
            wanted[key] = (scope.get(key) or b"").replace(self._alias, self._real)
        asked_in_text = b"multipart" not in headers.get(b"content-type", b"")
        answers_in_text = False

        async def receive_real() -> Any:
            message = await receive()
            if asked_in_text and message.get("body"):
                message = {**message, "body": message["body"].replace(self._alias, self._real)}
            return message

        async def send_alias(message: Any) -> None:
            nonlocal answers_in_text
            if message["type"] == "http.response.start":
                kind = dict(message["headers"]).get(b"content-type", b"")
                answers_in_text = kind.startswith((b"text/", b"application/json"))
                message = {
                    **message,
                    "headers": [
                        (key, value.replace(self._real, self._alias)) for key, value in message["headers"]
                    ],
                }
            elif answers_in_text and message.get("body"):
                message = {**message, "body": bytes(message["body"]).replace(self._real, self._alias)}
            await send(message)

        await self._app(wanted, receive_real, send_alias)
