"""Where shards lie: folders, and addresses that are none. Nothing here is opened.

An address may hold a secret: a password, a signed query, whatever a command of a pipe is given. Training needs
it; messages do not, and `told` takes it out of them.
"""

import re
import unicodedata
from pathlib import PurePosixPath

_USER = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/?#\"'<>]*@")
_QUERY = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://[^\s?#\"'<>]*)[?#][^\s\"'<>]*[^\s\"'<>:;,.)]")
_TURNING = frozenset(
    "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)  # direction of writing
_FILE = re.compile(r"[^\s/\\\"'=?&]+\.(?:tar|idx|json)(?![\w.])")


def is_remote(address: str) -> bool:
    """Say whether an address is a URL or a command, in place of a path."""
    return "://" in address or address.startswith("pipe:")


def is_http(address: str) -> bool:
    """Say whether an address is http or https, whose query, if any, belongs to each of its files."""
    return address.lower().startswith(("http://", "https://"))


def join(root: str, name: str) -> str:
    """Return the address of a file of a folder, URL prefix or command.

    Example:
        >>> join("https://host/set?signature=x", "manifest.json")
        'https://host/set/manifest.json?signature=x'
    """
    path, query = _split(root)
    return f"{path.rstrip('/')}/{name}{query}"


def index_of(tar: str) -> str:
    """Return the address of a tar's index.

    Example:
        >>> index_of("https://host/set/a.tar?signature=x")
        'https://host/set/a.idx?signature=x'
    """
    path, query = _split(tar)
    return f"{path.removesuffix('.tar')}.idx{query}"


def told(text: str) -> str:
    """Return a text without the secrets of the addresses in it.

    Example:
        >>> told("https://me:word@host/a.tar?signature=x cannot be read")
        'https://***@host/a.tar?*** cannot be read'
        >>> told("pipe:curl -H 'Authorization: x' https://host/a.tar cannot be read")
        'pipe:… a.tar cannot be read'
    """
    head, *commands = text.split("pipe:")
    for command in commands:  # nobody can tell which of its words are secret
        names = list(_FILE.finditer(command))
        head += f"pipe:… {command[names[-1].start() :]}" if names else "pipe:…"
    text = head
    return _QUERY.sub(r"\1?***", _USER.sub(r"\1***@", text))


def printable(text: object) -> str:
    """Return a text in which what would move a terminal's cursor, color it or begin a line is written as an escape.

    For names of files and whatever else comes from elsewhere, before it is printed.

    Example:
        >>> printable("a\\n\\x1b[2J 日本.jpg")
        'a\\\\n\\\\x1b[2J 日本.jpg'
    """
    return "".join(
        letter.encode("unicode_escape").decode() if _is_hidden(letter) else letter for letter in str(text)
    )


def _is_hidden(letter: str) -> bool:
    if letter.isascii():
        return not letter.isprintable()
    return unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in _TURNING


def name_of(address: str) -> str:
    """Return the name of the file at an address, without the way to it."""
    return PurePosixPath(_split(address)[0]).name


def _split(address: str) -> tuple[str, str]:
    if not is_http(address):
        return address, ""
    path, mark, query = address.partition("?")
    return path, mark + query
