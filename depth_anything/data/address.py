"""Addresses of shards: paths, URLs and commands. Nothing is opened here.

An address may contain a secret: a password, a signed query, any argument of a `pipe:` command. Reading needs it, but
messages must not show it: `redact_secrets` removes it.
"""

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

SET_NAME_RULE = "use A-Z a-z 0-9 _ -"

_SET_NAME = re.compile(r"[A-Za-z0-9_-]+")
_USERINFO = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/?#<>]*@")
_QUERY = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://[^\s?#\"'<>]*)[?#][^\s\"'<>]*[^\s\"'<>:;,.)]")
_BIDI_CONTROLS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# A query without scheme and host, as HTTP libraries quote it, and a header.
_SECRET_PARAMETER = re.compile(
    r"(?i)([?&;](?:x-(?:amz|goog|ms)-[\w-]+|awsaccesskeyid|signature|sig|se|sp|sv|policy|key-pair-id|expires"
    r"|[\w-]*(?:token|secret|password|passwd|key|auth|credential)s?)=)(?!\*\*\*)[^\s&;\"'<>]+"
)
_AUTH_HEADER = re.compile(r"(?i)\b((?:proxy-)?authorization\W{1,4}(?:bearer|basic|token)?\s*)[^\s\"',;)}\]]+")
_local_copies: dict[str, str] = {}  # path → address
_FILE_NAME = re.compile(r"[^\s/\\\"'=?&]+\.(?:tar|idx|json)(?![\w.])")


def is_set_name(name: str) -> bool:
    """Tell whether a text is a valid name of a set (`SET_NAME_RULE`); a folder of labels has it, too.

    Example:
        >>> is_set_name("own-2"), is_set_name("../own")
        (True, False)
    """
    return _SET_NAME.fullmatch(name) is not None


def is_remote(address: str) -> bool:
    """Tell whether an address is a URL or a command, not a path."""
    return "://" in address or address.startswith("pipe:")


def is_http(address: str) -> bool:
    """Tell whether an address is http or https; then its query, if any, is part of the address of each file."""
    return address.lower().startswith(("http://", "https://"))


def url_scheme(address: str) -> str:
    """Return the scheme of a URL in lower case, as "s3"."""
    return address.partition(":")[0].lower()


def join_address(root: str, name: str) -> str:
    """Return the address of a file in a folder, under a URL prefix, or behind a command.

    Example:
        >>> join_address("https://host/set?signature=x", "manifest.json")
        'https://host/set/manifest.json?signature=x'
    """
    path, query = _split_query(root)
    return f"{path.rstrip('/')}/{name}{query}"


def index_address(tar: str) -> str:
    """Return the address of the index of a tar.

    Example:
        >>> index_address("https://host/set/a.tar?signature=x")
        'https://host/set/a.idx?signature=x'
    """
    path, query = _split_query(tar)
    return f"{path.removesuffix('.tar')}.idx{query}"


def redact_secrets(text: str) -> str:
    """Replace passwords, queries, tokens and commands in a text.

    Example:
        >>> redact_secrets("https://me:word@host/a.tar?signature=x cannot be read")
        'https://***@host/a.tar?*** cannot be read'
        >>> redact_secrets("pipe:curl -H 'Authorization: x' https://host/a.tar cannot be read")
        'pipe:… a.tar cannot be read'
    """
    if "\n" in text:
        return "\n".join(map(redact_secrets, text.split("\n")))
    head, *commands = text.split("pipe:")
    for command in commands:  # any word of a command may be a secret
        names = list(_FILE_NAME.finditer(command))
        head += f"pipe:… {command[names[-1].start() :]}" if names else "pipe:…"
    text = _QUERY.sub(r"\1?***", _USERINFO.sub(r"\1***@", head))
    return _AUTH_HEADER.sub(r"\1***", _SECRET_PARAMETER.sub(r"\1***", text))


def remember_copy(path: Path, address: str) -> None:
    """Remember that a local file or folder is a copy of what an address names, for `with_addresses`."""
    _local_copies[str(path)] = address


def with_addresses(text: str) -> str:
    """Replace the paths of local copies in a text, as a message or a report, by their addresses."""
    for path, address in _local_copies.items():
        text = text.replace(path, address)
    return text


def redact_nested(value: Any) -> Any:
    """Apply `redact_secrets` to every text in nested mappings and lists, as in a config."""
    if isinstance(value, str):
        return redact_secrets(value)
    if isinstance(value, Mapping):
        return {key: redact_nested(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_nested(item) for item in value]
    return value


def strip_credentials(address: str) -> str:
    """Remove user, password and query from an address, so that two signed URLs of one file compare equal.

    Example:
        >>> strip_credentials("https://me:word@host/set?signature=x")
        'https://host/set'
    """
    return redact_secrets(address).replace("***@", "").removesuffix("?***")


def escape_unprintable(text: object) -> str:
    """Escape line breaks and characters that control a terminal.

    For file names and other text of foreign origin, before it is printed.

    Example:
        >>> escape_unprintable("a\\n\\x1b[2J 日本.jpg")
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
    """Return the last part of an address."""
    return PurePosixPath(_split_query(address)[0]).name


def _split_query(address: str) -> tuple[str, str]:
    if not is_http(address):
        return address, ""
    path, mark, query = address.partition("?")
    return path, mark + query
