"""Print the modules of docs/architecture.md: every file of the package with the first sentence of its docstring.

python docs/list_modules.py            print it
python docs/list_modules.py --write    put it into docs/architecture.md
"""

import ast
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "depth_anything"
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- modules: written by docs/list_modules.py -->", "<!-- end of modules -->"
WIDTH = 118


def summary(path: Path) -> str:
    """Return the first sentence of a module's docstring.

    Raises:
        ValueError: If the module has no docstring.
    """
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{path.relative_to(ROOT)} has no docstring")
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[^.]\.) (?=[A-Z`])", paragraph)[0].rstrip(".:")


def list_modules() -> str:
    """Return the list as Markdown, a heading for each folder."""
    files = sorted(PACKAGE.rglob("*.py"), key=lambda path: (len(path.parts) > 2, path.parent, path.name))
    folders: dict[Path, list[Path]] = {}
    for path in files:
        folders.setdefault(path.parent, []).append(path)
    lines: list[str] = []
    for folder, modules in folders.items():
        lines += ["", f"### {folder.relative_to(ROOT).as_posix()}/", ""]
        for path in modules:
            entry = f"`{path.relative_to(ROOT).as_posix()}`: {summary(path)}"
            lines += textwrap.wrap(
                entry,
                WIDTH,
                initial_indent="- ",
                subsequent_indent="  ",
                break_on_hyphens=False,
                break_long_words=False,
            )
    return "\n".join([*lines, ""])


def replace_list(page: str, listed: str) -> str:
    """Return the page with another list between its two marks."""
    before, _, rest = page.partition(START)
    return f"{before}{START}\n{listed}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(replace_list(PAGE.read_text(encoding="utf-8"), list_modules()), encoding="utf-8")
    else:
        print(list_modules())
