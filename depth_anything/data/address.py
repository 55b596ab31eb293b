"""Where shards lie: folders, and addresses that are none. Nothing here is opened.

An address may hold a secret: a password, a signed query, whatever a command of a pipe is given. Training needs
it; messages do not, and `told` takes it out of them.
"""

import re
import unicodedata
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

_USERINFO = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/?#<>]*@")
_QUERY = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://[^\s?#\"'<>]*)[?#][^\s\"'<>]*[^\s\"'<>:;,.)]")
_BIDI_CONTROLS = frozenset(
    "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)  # direction of writing
# A query without its scheme and host, as HTTP libraries quote it, and a header.
_SECRET_PARAMETER = re.compile(
    r"(?i)([?&;](?:x-(?:amz|goog|ms)-[\w-]+|awsaccesskeyid|signature|sig|se|sp|sv|policy|key-pair-id|expires"
    r"|[\w-]*(?:token|secret|password|passwd|key|auth|credential)s?)=)(?!\*\*\*)[^\s&;\"'<>]+"
)
_AUTH_HEADER = re.compile(r"(?i)\b((?:proxy-)?authorization\W{1,4}(?:bearer|basic|token)?\s*)[^\s\"',;)}\]]+")
_FILE_NAME = re.compile(r"[^\s/\\\"'=?&]+\.(?:tar|idx|json)(?![\w.])")


def is_remote(address: str) -> bool:
    """Say whether an address is a URL or a command, in place of a path."""
    return "://" in address or address.startswith("pipe:")


def is_http(address: str) -> bool:
    """Say whether an address is http or https, whose query, if any, belongs to each of its files."""
    return address.lower().startswith(("http://", "https://"))


def join_address(root: str, name: str) -> str:
    """Return the address of a file of a folder, URL prefix or command.

    Example:
        >>> join("https://host/set?signature=x", "manifest.json")
        'https://host/set/manifest.json?signature=x'
    """
    path, query = _split_query(root)
    return f"{path.rstrip('/')}/{name}{query}"


def index_address(tar: str) -> str:
    """Return the address of a tar's index.

    Example:
        >>> index_of("https://host/set/a.tar?signature=x")
        'https://host/set/a.idx?signature=x'
    """
    path, query = _split_query(tar)
    return f"{path.removesuffix('.tar')}.idx{query}"


def redact_secrets(text: str) -> str:
    """Return a text without the secrets of the addresses in it.

    Example:
        >>> told("https://me:word@host/a.tar?signature=x cannot be read")
        'https://***@host/a.tar?*** cannot be read'
        >>> told("pipe:curl -H 'Authorization: x' https://host/a.tar cannot be read")
        'pipe:… a.tar cannot be read'
    """
    if "\n" in text:
        return "\n".join(map(redact_secrets, text.split("\n")))
    head, *commands = text.split("pipe:")
    for command in commands:  # nobody can tell which of its words are secret
        names = list(_FILE_NAME.finditer(command))
        head += f"pipe:… {command[names[-1].start() :]}" if names else "pipe:…"
    text = _QUERY.sub(r"\1?***", _USERINFO.sub(r"\1***@", head))
    return _AUTH_HEADER.sub(r"\1***", _SECRET_PARAMETER.sub(r"\1***", text))


def redact_nested(value: Any) -> Any:
    """Return a plain value, as a config, with every text in it as `told` gives it."""
    if isinstance(value, str):
        return redact_secrets(value)
    if isinstance(value, Mapping):
        return {key: redact_nested(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_nested(item) for item in value]
    return value


def strip_credentials(address: str) -> str:
    """Reduce an address to where it leads, whoever asks and until when: without user, password and query.

    Example:
        >>> same_place("https://me:word@host/set?signature=x")
        'https://host/set'
    """
    return redact_secrets(address).replace("***@", "").removesuffix("?***")


def escape_unprintable(text: object) -> str:
    """Return a text in which what would move a terminal's cursor, color it or begin a line is written as an escape.

    For names of files and whatever else comes from elsewhere, before it is printed.

    Example:
        >>> printable("a\\n\\x1b[2J 日本.jpg")
        'a\\\\n\\\\x1b[2J 日本.jpg'
    """
    return "".join(
        letter.encode("unicode_escape").decode() if _is_unprintable(letter) else letter
        for letter in str(text)
    )


def _is_unprintable(letter: str) -> bool:
    if letter.isascii():
        return not letter.isprintable()
    return unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in _BIDI_CONTROLS


def file_name(address: str) -> str:
    """Return the name of the file at an address, without the way to it."""
    return PurePosixPath(_split_query(address)[0]).name


def _split_query(address: str) -> tuple[str, str]:
    if not is_http(address):
        return address, ""
    path, mark, query = address.partition("?")
    return path, mark + query
