"""The directory walk that all sources share."""

import os

import pytest

from depth_anything.ingest.find_files import walk_files


def tree(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def names(root, **options):
    return [name for name, _ in walk_files(root, **{"follow": True, **options})]


def test_files_are_listed_in_the_byte_order_of_their_paths(tmp_path):
    files = ["a/2", "a/b/1", "a-b", "a.c", "b", "ä/1", "z"]
    assert names(tree(tmp_path, *reversed(files))) == sorted(files, key=os.fsencode)


def test_files_first_lists_a_folder_before_its_subfolders(tmp_path):
    tree(tmp_path, "a/x", "b/c/x", "b/y", "x")
    assert names(tmp_path, files_first=True) == ["x", "a/x", "b/y", "b/c/x"]


def test_skipped_folders_are_not_opened(tmp_path):
    tree(tmp_path, "a/x", ".hidden/x", "b/.hidden/x")
    os.chmod(tmp_path / ".hidden", 0)
    assert names(tmp_path, skip_folder=lambda path: path.name.startswith(".")) == ["a/x"]
    os.chmod(tmp_path / ".hidden", 0o700)


def test_links_to_folders_are_followed_once_or_listed(tmp_path):
    tree(tmp_path, "a/x")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert names(tmp_path) == ["a/x"]
    assert list(walk_files(tmp_path, follow=False)) == [
        ("a/loop", None),
        ("a/x", tmp_path / "a" / "x"),
        ("b", None),
    ]


def test_a_folder_that_cannot_be_listed_is_an_error_or_reported(tmp_path, monkeypatch):
    tree(tmp_path, "a/x", "b/x")
    scandir, errors = os.scandir, []

    def fail(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(ValueError, match=f"{tmp_path}/a .*Permission denied"):
        names(tmp_path)
    assert names(tmp_path, on_error=lambda name, error: errors.append(name)) == ["b/x"] and errors == ["a/"]
