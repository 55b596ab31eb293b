"""tools/measure_code.py counts what it says it counts."""

import doctest
from pathlib import Path

import measure_code

ROOT = Path(__file__).resolve().parents[1]


def test_its_examples_are_true() -> None:
    result = doctest.testmod(measure_code)
    assert result.attempted >= 3 and not result.failed


def test_lines_are_counted_by_kind(tmp_path: Path) -> None:
    package = tmp_path / "depth_anything"
    package.mkdir()
    (package / "a.py").write_text('"""Doc.\n\nMore.\n"""\n\n# why\nX = (\n    1\n)\n"""Of X."""\n')
    size = measure_code.size(tmp_path)
    assert (size["files"], size["lines"], size["code lines"], size["docstring lines"]) == (1, 10, 3, 5)


def test_shared_lines_are_found_once_and_at_full_length(tmp_path: Path) -> None:
    package = tmp_path / "depth_anything"
    package.mkdir()
    same = [f"value_{i} = {i}" for i in range(8)]
    (package / "a.py").write_text("\n".join(["a = 1", *same, "b = 2"]) + "\n")
    (package / "b.py").write_text("\n".join(["c = 1", "d = 2", *same]) + "\n")
    (only,) = measure_code.shared_lines(tmp_path)
    assert only["lines"] == 8 and only["places"] == ["depth_anything/a.py:2", "depth_anything/b.py:3"]


def test_a_walk_counts_files_functions_and_crossings() -> None:
    counts = measure_code.walk("key", ROOT)
    assert (
        3 < counts["files"] <= counts["functions"] and counts["crossings"] >= counts["distinct crossings"] > 3
    )
    assert "training/run.py" in counts["in"]
