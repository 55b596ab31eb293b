from pathlib import Path

import numpy as np
import pytest
from made_raw import frames_of, make_tartanair, picture, png

from depth_anything.ingest.sets import tartanair


def test_depth_is_stored_unchanged_and_far_pixels_are_sky(tmp_path):
    truth = make_tartanair(tmp_path)
    found = frames_of(tartanair, tmp_path)
    assert list(found) == sorted(truth)
    for name, frame in found.items():
        np.testing.assert_array_equal(frame.depth, truth[name].astype(np.float32))
        assert np.isinf(frame.depth[:6]).all() and np.isinf(frame.depth[6, 6])  # 1000 m and more
        assert frame.depth[7, 6] == 999.9375
        assert np.isnan(frame.depth[8, 8])
        assert frame.meta["sky"] == "inf" and frame.meta["unit"] == "m"
        assert frame.meta["intrinsics"] == {"fx": 320, "fy": 320, "cx": 320, "cy": 240}


def test_infinite_depth_is_not_sky(tmp_path):
    make_tartanair(tmp_path, environments=("ocean",))
    path = next(tmp_path.rglob("Easy/P000/depth_left/000000_left_depth.npy"))
    depth = np.load(path)
    depth[20, 20:23] = [np.inf, np.nan, -5]
    np.save(path, depth)
    frame = next(iter(frames_of(tartanair, tmp_path).values()))
    assert np.isnan(frame.depth[20, 20:23]).all()


def test_images_and_depth_may_be_in_separate_folders(tmp_path):
    truth = make_tartanair(tmp_path / "images", environments=("ocean",))
    moved = list((tmp_path / "images").rglob("depth_left"))
    for folder in moved:
        there = tmp_path / "depth" / folder.relative_to(tmp_path / "images")
        there.parent.mkdir(parents=True)
        folder.rename(there)
    found = frames_of(tartanair, tmp_path)
    assert list(found) == sorted(truth)
    assert all(frame.depth is not None for frame in found.values())


def test_the_environment_with_a_dome_is_left_out_by_default(tmp_path):
    make_tartanair(tmp_path / "as" / "downloaded")
    names = [line.partition("\t")[0] for line in tartanair.find(tmp_path)]
    assert tartanair.INFO.leave_out == ("amusement/*",)
    assert sum(name.startswith("amusement/") for name in names) == 4


def test_a_frame_with_a_missing_file_is_listed_and_rejected(tmp_path):
    truth = make_tartanair(tmp_path, environments=("ocean",))
    first, second = sorted(tmp_path.rglob("Easy/P000/depth_left/*.npy"))
    first.unlink()
    second.with_name("000009_left_depth.npy").write_bytes(second.read_bytes())
    found = frames_of(tartanair, tmp_path)
    assert set(found) == {*truth, "ocean/Easy/P000/000009"}
    assert found["ocean/Easy/P000/000000"] == (
        "its depth is missing: no file *_left_depth.npy in a folder depth_left"
    )
    assert "its image is missing" in found["ocean/Easy/P000/000009"]


@pytest.mark.parametrize("damage", ["empty", "short", "pickle", "other size", "folder", "loop"])
def test_damaged_depth_is_rejected_with_a_reason(tmp_path, damage):
    make_tartanair(tmp_path, environments=("ocean",))
    path = next(tmp_path.rglob("Easy/P000/depth_left/000000_left_depth.npy"))
    data = path.read_bytes()
    path.unlink()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "short":
        path.write_bytes(data[:-1])
    elif damage == "pickle":
        np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    elif damage == "other size":
        np.save(path, np.ones((36, 47), np.float32))
    elif damage == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    reasons = [frame for frame in frames_of(tartanair, tmp_path).values() if isinstance(frame, str)]
    if damage == "folder":  # a folder is no file: there is no depth
        assert "its depth is missing" in reasons[0]
    assert len(reasons) == 1 and ("depth" in reasons[0] or "NPY" in reasons[0])


def test_another_layout_is_an_error_with_the_expected_layout(tmp_path):
    with pytest.raises(ValueError, match="TartanAir: .*ENV/Easy/P000/image_left"):
        list(tartanair.find(tmp_path))
    png(tmp_path / "left" / "000000_left.png", picture(np.ones((8, 8))))
    with pytest.raises(ValueError, match="TartanAir"):
        list(tartanair.find(tmp_path))
    (tmp_path / "left" / "image_left.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="unpack"):
        list(tartanair.find(tmp_path))
    with pytest.raises(ValueError, match="type the path"):
        list(tartanair.find(tmp_path / "nowhere"))


def test_two_folders_with_the_same_frames_are_an_error(tmp_path):
    make_tartanair(tmp_path / "a", environments=("ocean",))
    make_tartanair(tmp_path / "b", environments=("ocean",))
    with pytest.raises(ValueError, match="ocean/Easy/P000"):
        list(tartanair.find(tmp_path))


def test_links_to_folders_are_followed_and_link_loops_end(tmp_path):
    truth = make_tartanair(tmp_path / "disk", environments=("ocean",))
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "ocean").symlink_to(tmp_path / "disk" / "ocean")
    Path(tmp_path, "disk", "ocean", "again").symlink_to(raw)
    assert list(frames_of(tartanair, raw)) == sorted(truth)


def test_frames_with_any_file_name_are_read(tmp_path):
    truth = make_tartanair(tmp_path, environments=("tab\there", "line\nbreak", "back\\slash", "ärger 日本"))
    found = frames_of(tartanair, tmp_path)
    assert len(found) == len(truth) and all(frame.depth is not None for frame in found.values())


def test_two_files_of_one_frame_are_ambiguous(tmp_path):
    """As on a disk whose names are longer than those that the source knows."""
    from depth_anything.ingest.frame_files import FilePattern, find_frames, read_frame_file, split_fields

    (tmp_path / "imgs").mkdir()
    for name in ("a.jpg", "a.png", "b.jpg"):
        (tmp_path / "imgs" / name).write_bytes(b"x")
    kind = FilePattern("image", "imgs", r"(.+)\.(?:jpg|png)")
    a, b = find_frames(tmp_path, tartanair.INFO, [kind], sequence=lambda parts: "")
    assert (
        split_fields(b) == ["b", "imgs/b.jpg"] and read_frame_file(tmp_path, kind, split_fields(b)[1]) == b"x"
    )
    with pytest.raises(ValueError, match="its image is ambiguous"):
        read_frame_file(tmp_path, kind, split_fields(a)[1])
