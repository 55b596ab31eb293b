"""Measure how hard this code base is to search and to follow: sizes, names, and four walks through it.

    python tools/measure_code.py                        this checkout, as a table
    python tools/measure_code.py --json outputs/code.json
    python tools/measure_code.py --root OTHER_CHECKOUT --no-walks

The walks run real commands in a new process each and count, with sys.setprofile and warm caches, which files and
functions of the package run: a photo through `depth-anything predict`, a KITTI-like frame through
`depth-anything evaluate`, one sample from shard to batch, and a config key through `train.py` (a dry run). A crossing
is a call of a function of the package whose nearest caller in the package is in another file.

Only command lines are used, so that the same script measures checkouts from before and after a change of the code's
names. It needs the project's dependencies for the walks, and git for the commits.
"""

import argparse
import ast
import io
import json
import re
import statistics
import subprocess
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from code_walks import PACKAGE, TITLES, WALKS, walk

MAX_DOC_LINE, MAX_SUBJECT = 120, 72
MAX_CELL = 60  # characters of a table cell that lists names
SHARED_LINES = 6


# ------------------------------------------------------------------------------------------------ files


def python_files(root: Path, *folders: str) -> list[Path]:
    """List the Python files of some folders, sorted, without caches and environments."""
    found = [path for folder in folders for path in (root / folder).rglob("*.py")]
    return sorted(path for path in found if not {"__pycache__", ".venv"} & set(path.parts))


def trees(root: Path) -> dict[Path, ast.Module]:
    """Parse every file of the package."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in python_files(root, PACKAGE)}


def docstring_nodes(tree: ast.AST) -> Iterator[ast.Constant]:
    """Yield the docstrings of a module, its classes, functions and attributes (a string that is a statement)."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.value


def count_lines(path: Path, tree: ast.Module) -> dict[str, int]:
    """Count the lines of a file by kind: code, docstring, comment, blank."""
    text = path.read_text(encoding="utf-8")
    documented = {n for node in docstring_nodes(tree) for n in range(node.lineno, (node.end_lineno or 0) + 1)}
    coded: set[int] = set()
    ignored = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in ignored:
            coded.update(range(token.start[0], token.end[0] + 1))
    lines = text.splitlines()
    kinds = Counter()
    for number, line in enumerate(lines, 1):
        if number in documented:
            kinds["docstring"] += 1
        elif number in coded:
            kinds["code"] += 1
        else:
            kinds["comment" if line.strip() else "blank"] += 1
    return {"lines": len(lines), **kinds}


def size(root: Path) -> dict[str, int]:
    """Count files and lines of the package and of the tests."""
    total: Counter[str] = Counter()
    parsed = trees(root)
    for path, tree in parsed.items():
        total.update(count_lines(path, tree))
    tests = python_files(root, "tests")
    return {
        "files": len(parsed),
        **{
            f"{kind} lines" if kind != "lines" else kind: total[kind]
            for kind in ("lines", "code", "docstring")
        },
        "test files": len(tests),
        "test lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in tests),
    }


# ------------------------------------------------------------------------------- names, types, functions


def functions(parsed: dict[Path, ast.Module]) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """List every function and method of the package."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for tree in parsed.values() for node in ast.walk(tree) if isinstance(node, kinds)]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """List a function's parameters, those that stand for several included."""
    spec = function.args
    several = [argument for argument in (spec.vararg, spec.kwarg) if argument is not None]
    return [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *several]


def is_untyped_dict(annotation: str) -> bool:
    """Tell whether an annotation is a dict or a Mapping whose values may be anything.

    >>> is_untyped_dict("dict[str, Any]"), is_untyped_dict("Mapping[str, Any] | None"), is_untyped_dict("dict")
    (True, True, True)
    >>> is_untyped_dict("Mapping[str, str]"), is_untyped_dict("dict[str, np.ndarray]")
    (False, False)
    """
    return bool(
        re.search(r"\b(?:dict|Mapping|MutableMapping)\b(?:\[\w+, (?:Any|object)\]|(?!\[))", annotation)
    )


def interfaces(parsed: dict[Path, ast.Module], root: Path) -> dict[str, Any]:
    """Measure annotations and lengths of functions."""
    by_folder: Counter[str] = Counter()
    hinted = total = 0
    for path, tree in parsed.items():
        folder = path.relative_to(root / PACKAGE).parts[0]
        for function in functions({path: tree}):
            for parameter in parameters(function):
                if parameter.arg in ("self", "cls"):
                    continue
                total += 1
                hinted += parameter.annotation is not None
                if parameter.annotation is not None and is_untyped_dict(ast.unparse(parameter.annotation)):
                    by_folder[folder] += 1
            total += 1
            hinted += function.returns is not None
    lengths = [(node.end_lineno or 0) - node.lineno + 1 for node in functions(parsed)]
    return {
        "parameters typed dict or Mapping[str, Any]": sum(by_folder.values()),
        "of these in": dict(by_folder.most_common()),
        "longest function": max(lengths),
        "median function": statistics.median(lengths),
        "functions": len(lengths),
        "hints, %": round(100 * hinted / total, 1),
    }


def repeated(names: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    """Keep the names that come more than once, with where they are."""
    places: defaultdict[str, list[str]] = defaultdict(list)
    for name, place in names:
        places[name].append(place)
    return {name: there for name, there in sorted(places.items()) if len(there) > 1}


def names(parsed: dict[Path, ast.Module], root: Path) -> dict[str, dict[str, list[str]]]:
    """Find file names and class names of the package that occur more than once."""
    relative = {path: path.relative_to(root).as_posix() for path in parsed}
    files = (
        (path.name, relative[path]) for path in parsed if path.name not in ("__init__.py", "__main__.py")
    )
    classes = (
        (node.name, relative[path])
        for path, tree in parsed.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )
    return {"repeated file names": repeated(files), "repeated class names": repeated(classes)}


def two_way_imports(parsed: dict[Path, ast.Module], root: Path) -> list[str]:
    """Find pairs of parts (top-level modules and folders of the package) that import each other."""
    edges: set[tuple[str, str]] = set()
    for path, tree in parsed.items():
        here = path.relative_to(root / PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(tree):
            modules: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                parts = module.split(".")
                if parts[0] == PACKAGE and len(parts) > 1 and parts[1] != here and here != "__init__":
                    edges.add((here, parts[1]))
    return sorted(f"{a} <-> {b}" for a, b in edges if a < b and (b, a) in edges)


# ----------------------------------------------------------------------------------- prose, tests, commits


def is_sentence(pattern: str) -> bool:
    """Tell whether a pattern is English prose: three words in a row, each of two letters or more.

    >>> is_sentence("is not a set of shards"), is_sentence("outputs/teacher"), is_sentence("steps=300")
    (True, False, False)
    """
    return bool(re.search(r"[A-Za-z]{2,}[ ,]+[A-Za-z]{2,}[ ,]+[A-Za-z]{2,}", pattern))


def pinned_sentences(root: Path) -> dict[str, int]:
    """Count `match=` in tests, and those whose pattern is a sentence."""
    total = sentences = 0
    for path in python_files(root, "tests"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "match":
                text = "".join(
                    part.value
                    for part in ast.walk(node.value)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                )
                total += 1
                sentences += is_sentence(text)
    return {"match= in tests": total, "match= that pin a sentence": sentences}


def documents(root: Path) -> list[Path]:
    """List the documents: Markdown at the top, in docs/ and next to what it describes."""
    patterns = ("*.md", "docs/**/*.md", "benchmarks/*.md", "slurm/*.md")
    return sorted({path for pattern in patterns for path in root.glob(pattern)})


def prose(root: Path) -> dict[str, Any]:
    """Measure the documents' lines and the README's words."""
    lines = [line for path in documents(root) for line in path.read_text(encoding="utf-8").splitlines()]
    return {
        "doc lines": len(lines),
        f"doc lines over {MAX_DOC_LINE}": sum(len(line) > MAX_DOC_LINE for line in lines),
        "README words": len((root / "README.md").read_text(encoding="utf-8").split()),
    }


def commits(root: Path, span: str) -> dict[str, Any]:
    """Count the commits of a range whose subject is longer than 72 characters."""
    asked = subprocess.run(
        ["git", "-C", str(root), "log", "--no-merges", "--format=%s", span], capture_output=True, text=True
    )
    subjects = asked.stdout.splitlines()
    return {
        "commits": len(subjects),
        f"subjects over {MAX_SUBJECT}": sum(len(s) > MAX_SUBJECT for s in subjects),
    }


# -------------------------------------------------------------------------------------- lines shared


def significant(path: Path) -> list[tuple[int, str]]:
    """List a file's lines (number, text without indentation) that are code, without imports and docstrings."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    left_out = {n for node in docstring_nodes(tree) for n in range(node.lineno, (node.end_lineno or 0) + 1)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out.update(range(node.lineno, (node.end_lineno or 0) + 1))
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [
        (n, line) for n, line in lines if n not in left_out and re.search(r"\w", line) and line[:1] != "#"
    ]


def shared_lines(root: Path, least: int = SHARED_LINES) -> list[dict[str, Any]]:
    """Find pairs of places in the whole tree that share `least` or more lines of code in a row."""
    files = python_files(root, PACKAGE, "tests", "benchmarks", "docs", "tools")
    files += [path for path in sorted(root.glob("*.py"))]
    lines = {path: significant(path) for path in files}
    windows: defaultdict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    for path, code in lines.items():
        for start in range(len(code) - least + 1):
            windows[tuple(text for _, text in code[start : start + least])].append((path, start))
    found, seen = [], set()
    for places in windows.values():
        for i, (a, x) in enumerate(places):
            for b, y in places[i + 1 :]:
                if (a, x, b, y) in seen:
                    continue
                length = 0
                while (
                    x + length < len(lines[a])
                    and y + length < len(lines[b])
                    and lines[a][x + length][1] == lines[b][y + length][1]
                    and (a != b or x + length < y)
                ):
                    seen.add((a, x + length, b, y + length))
                    length += 1
                if length >= least:
                    where = [f"{p.relative_to(root)}:{lines[p][at][0]}" for p, at in ((a, x), (b, y))]
                    found.append({"lines": length, "places": where, "first": lines[a][x][1]})
    return sorted(found, key=lambda one: (-one["lines"], one["places"]))


# --------------------------------------------------------------------------------------------- all of it


def measure(root: Path, *, walks: bool, span: str) -> dict[str, Any]:
    """Measure a checkout.

    Args:
        root: Its folder.
        walks: Whether to run the four commands too, which takes a minute.
        span: The git range whose commit subjects are measured.
    """
    parsed = trees(root)
    shared = shared_lines(root)
    return {
        "size": size(root),
        "walks": {name: walk(name, root) for name in WALKS} if walks else {},
        "interfaces": interfaces(parsed, root),
        "names": names(parsed, root),
        "two-way imports": two_way_imports(parsed, root),
        "tests": pinned_sentences(root),
        "prose": prose(root),
        "commits": commits(root, span),
        "shared lines": {"places": len(shared), "list": shared},
    }


def rows(measured: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the table of the report: what is measured, and its value."""
    lines = measured["size"]
    yield (
        "package: files, lines (code, docstrings)",
        (f"{lines['files']}, {lines['lines']:,} ({lines['code lines']:,}, {lines['docstring lines']:,})"),
    )
    yield "tests: files, lines", f"{lines['test files']}, {lines['test lines']:,}"
    for name, counts in measured["walks"].items():
        figures = ", ".join(str(counts[key]) for key in ("files", "functions", "crossings"))
        yield (
            f"{TITLES[name]}: files, functions, crossings",
            f"{figures} ({counts['distinct crossings']} distinct)",
        )
    faces, untyped = measured["interfaces"], "parameters typed dict or Mapping[str, Any]"
    where = ", ".join(f"{folder} {count}" for folder, count in faces["of these in"].items())
    yield untyped, f"{faces[untyped]} ({where})"
    for kind, found in measured["names"].items():
        names_found = f"{len(found)} ({', '.join(found)})" if found else "0"
        yield kind, names_found if len(names_found) < MAX_CELL else str(len(found))
    yield (
        "lines of the longest function, median, hints",
        (f"{faces['longest function']}, {faces['median function']:g}, {faces['hints, %']:g} %"),
    )
    yield "two-way imports", ", ".join(measured["two-way imports"]) or "none"
    for section in ("tests", "prose", "commits"):
        for kind, value in measured[section].items():
            yield kind, f"{value:,}"
    yield f"pairs of places that share {SHARED_LINES} or more lines", str(measured["shared lines"]["places"])


def main() -> None:
    """Measure, print the table, and write the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the checkout")
    parser.add_argument(
        "--json", type=Path, help="write all figures, with the names behind them, to this file"
    )
    parser.add_argument(
        "--before", type=Path, help="a file of --json, shown in a column next to today's figures"
    )
    parser.add_argument("--no-walks", action="store_true", help="do not run the four commands")
    parser.add_argument(
        "--commits", default="HEAD", help="git range whose subjects are measured, as main..HEAD"
    )
    options = parser.parse_args()
    root = options.root.resolve()
    measured = measure(root, walks=not options.no_walks, span=options.commits)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    if not options.before:
        print("| measure | value |\n|---|---|")
        for kind, value in rows(measured):
            print(f"| {kind} | {value} |")
        return
    before = dict(rows(json.loads(options.before.read_text(encoding="utf-8"))))
    print("| measure | before | now |\n|---|---|---|")
    for kind, value in rows(measured):
        print(f"| {kind} | {before.get(kind, '')} | {value} |")


if __name__ == "__main__":
    main()
