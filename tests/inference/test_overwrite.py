"""Overwrite protection of predict_files, errors of single files, and memory checks."""

import errno
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from depth_anything.disk import atomic_write, temporary_path
from depth_anything.inference import files, memory
from depth_anything.inference.files import PredictSettings, predict_files
from depth_anything.inference.predictor import Predictor

EVERY = ("png8", "png16", "npy", "npz", "exr", "ply", "glb")


@pytest.fixture
def unused(predictor):
    """A predictor whose network must not run."""

    class Unused(Predictor):
        def _forward(self, batch):
            raise AssertionError("the network ran")

    return Unused(predictor.model, device="cpu", input_size=28)


def photo(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)).save(path)
    return path


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def refused(predictor, source, output, name, **how):
    """Assert that the run is refused before the network runs, naming the file, and that nothing changes."""
    before = contents(output)
    with pytest.raises(
        ValueError, match=rf"{name} (was not written by|is read by) this command .*another folder"
    ):
        predict_files(predictor, source, output, **how)
    assert contents(output) == before


def test_the_input_image_is_not_replaced(tmp_path, unused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "photo.png")
    for source in ("photo.png", "./photo.png", tmp_path / "photo.png"):
        refused(unused, source, tmp_path, "photo.png")
    with pytest.raises(ValueError, match=r"photo\.png"):
        predict_files(unused, "photo.png", ".")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("a.json", PredictSettings(())),
        ("a.png", PredictSettings(())),
        ("a_disparity.png", PredictSettings(("png16",))),
        ("a_disparity_8bit.png", PredictSettings(("png8",))),
        ("a_disparity.npy", PredictSettings(("npy",))),
        ("a_points.ply", PredictSettings(("ply",))),
    ],
)
@pytest.mark.parametrize("content", [b"mine", b'{"mine": 1}', b"[]", b""])
def test_a_users_file_next_to_the_image_is_not_replaced(tmp_path, unused, name, settings, content):
    photo(tmp_path / "in/a.jpg")
    (tmp_path / "in" / name).write_bytes(content)
    refused(unused, tmp_path / "in/a.jpg", tmp_path / "in", name, settings=settings)


def test_images_of_lists_and_tars_are_not_replaced(tmp_path, unused):
    photo(tmp_path / "deep/a.png")
    (tmp_path / "list.txt").write_text("deep/a.png\n")
    refused(unused, tmp_path / "list.txt", tmp_path, "a.png")
    photo(tmp_path / "b.jpg")
    (tmp_path / "b.json").write_text("b.jpg\n")  # a list that is called as what is written
    refused(unused, tmp_path / "b.json", tmp_path, "b.json")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(tmp_path / "deep/a.png", "t.png")
    (tmp_path / "t.json").write_text("{}")
    refused(unused, tmp_path / "t.tar", tmp_path, "t.json")


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_to_photographs_are_not_replaced(tmp_path, unused, link):
    photo(tmp_path / "in/a.jpg")
    (tmp_path / "out").mkdir()
    link(tmp_path / "in/a.jpg", tmp_path / "out/a.png")
    refused(unused, tmp_path / "in/a.jpg", tmp_path / "out", "a.png")


def test_broken_links_and_folders_are_not_replaced(tmp_path, unused):
    photo(tmp_path / "in/a.jpg")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.json").symlink_to("nowhere")
    refused(unused, tmp_path / "in/a.jpg", tmp_path / "out", "a.json")
    (tmp_path / "out/a.json").unlink()
    (tmp_path / "out/a.png").mkdir()
    refused(unused, tmp_path / "in/a.jpg", tmp_path / "out", "a.png")


def test_an_output_folder_that_links_to_the_input_is_refused(tmp_path, unused):
    photo(tmp_path / "in/a.png")
    (tmp_path / "out").symlink_to("in", target_is_directory=True)
    with pytest.raises(ValueError, match=str(tmp_path / "out")):
        predict_files(unused, tmp_path / "in", tmp_path / "out")
    refused(unused, tmp_path / "in/a.png", tmp_path / "out", "a.png")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=str(tmp_path / "file")):
        predict_files(unused, tmp_path / "in", tmp_path / "file")


def test_own_maps_are_replaced_by_another_run(tmp_path, predictor):
    photo(tmp_path / "in/a.jpg")
    out = tmp_path / "out"
    predict_files(predictor, tmp_path / "in", out, settings=PredictSettings(EVERY))
    first = contents(out)
    predict_files(predictor, tmp_path / "in", out, settings=PredictSettings(EVERY))
    assert contents(out) == first
    predict_files(predictor, tmp_path / "in", out, settings=PredictSettings(("npy",), pred_only=True))
    assert contents(out)["a.png"] != first["a.png"]


def test_a_map_that_the_user_edited_is_not_replaced(tmp_path, predictor, unused):
    photo(tmp_path / "in/a.jpg")
    predict_files(predictor, tmp_path / "in", tmp_path / "out")
    photo(tmp_path / "out/a.png", seed=5)
    refused(unused, tmp_path / "in", tmp_path / "out", "a.png")
    photo(tmp_path / "in/b.jpg")
    refused(unused, tmp_path / "in", tmp_path / "out", "a.png")  # nor does it let the others run


def test_a_map_that_is_an_input_is_not_replaced(tmp_path, predictor, unused):
    photo(tmp_path / "in/a.jpg")
    predict_files(predictor, tmp_path / "in", tmp_path / "out", settings=PredictSettings(()))
    refused(unused, tmp_path / "out/a.png", tmp_path / "out", "a.png")


def test_maps_of_versions_without_digests_are_recognized(tmp_path, predictor, unused):
    photo(tmp_path / "in/a.jpg")
    predict_files(predictor, tmp_path / "in", tmp_path / "out")
    record = tmp_path / "out/a.json"
    notes = json.loads(record.read_text())
    older = {key: value for key, value in notes.items() if key not in ("sha256", "made_by")}
    record.write_text(json.dumps(older))
    assert predict_files(predictor, tmp_path / "in", tmp_path / "out").images == 1
    record.write_text(json.dumps({**notes, "made_by": "depth-anything video"}))
    refused(unused, tmp_path / "in", tmp_path / "out", "a.png")


def test_a_run_killed_while_writing_can_be_repeated(tmp_path, predictor, monkeypatch):
    photo(tmp_path / "in/a.jpg")

    class Killed(BaseException):
        pass

    written = []

    def kill(path, data):
        if len(written) == stop:
            raise Killed
        written.append(path)
        atomic_write(path, data)

    for stop in range(3):
        written.clear()
        with monkeypatch.context() as patch:
            patch.setattr(files, "atomic_write", kill)
            patch.setattr(files.Path, "unlink", lambda *args, **kwargs: None)  # a kill cleans nothing up
            with pytest.raises(Killed):
                predict_files(predictor, tmp_path / "in", tmp_path / f"out{stop}")
        assert predict_files(predictor, tmp_path / "in", tmp_path / f"out{stop}").images == 1


def test_a_file_created_during_the_run_is_not_replaced(tmp_path, predictor):
    photo(tmp_path / "in/a.jpg")

    class Slow(Predictor):
        def predict_batch(self, images, *, prepared=None):
            (tmp_path / "out").mkdir()
            (tmp_path / "out/a.png").write_bytes(b"another's")
            return super().predict_batch(images, prepared=prepared)

    with pytest.raises(ValueError, match=r"out/a\.png"):
        predict_files(Slow(predictor.model, device="cpu", input_size=28), tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / "out") == {"a.png": b"another's"}


# Errors of single images and of the disk


def test_a_file_name_too_long_for_the_disk_is_skipped(tmp_path, predictor):
    long, longest = "n" * 236 + ".jpg", "ü" * 125 + ".jpg"
    for name in ("a.jpg", long, longest, "z.jpg"):
        photo(tmp_path / "in" / name)
    outcome = predict_files(predictor, tmp_path / "in", tmp_path / "out", batch_size=2)
    assert outcome.images == 3 and list(outcome.failed) == [longest]
    stems = {path.name.removesuffix(".json") for path in (tmp_path / "out").glob("*.json")}
    assert stems == {"a", "n" * 236, "z"}
    assert not [name for name in contents(tmp_path / "out") if name.startswith("ü")]  # not half of it


def test_temporary_names_fit_any_file_system(tmp_path):
    for name in ("x" * 255, "日" * 85, "a.tar"):
        temporary = temporary_path(tmp_path / name)
        assert len(os.fsencode(temporary.name)) <= 255 and temporary.parent == tmp_path
    assert temporary_path(tmp_path / "a.tar").name.startswith(".tmp.a.tar.")


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENAMETOOLONG, errno.EISDIR, errno.EILSEQ])
def test_an_image_that_cannot_be_written_does_not_stop_the_rest(tmp_path, predictor, monkeypatch, code):
    for name in ("a", "b", "c"):
        photo(tmp_path / f"in/{name}.jpg")

    def write(path, data):
        if path.name == "b_disparity.png":
            raise OSError(code, os.strerror(code), str(path))
        atomic_write(path, data)

    monkeypatch.setattr(files, "atomic_write", write)
    outcome = predict_files(predictor, tmp_path / "in", tmp_path / "out")
    assert outcome.images == 2 and list(outcome.failed) == ["b.jpg"]
    assert sorted(contents(tmp_path / "out")) == sorted(
        f"{stem}{end}" for stem in "ac" for end in (".json", ".png", "_disparity.png")
    )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_or_read_only_disk_stops_the_run(tmp_path, predictor, monkeypatch, code):
    photo(tmp_path / "in/a.jpg")

    def write(path, data):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(files, "atomic_write", write)
    with pytest.raises(OSError) as caught:
        predict_files(predictor, tmp_path / "in", tmp_path / "out")
    assert caught.value.errno == code


def test_an_image_that_cannot_be_read_does_not_stop_the_rest(tmp_path, predictor, monkeypatch):
    for name in ("a", "b", "c"):
        photo(tmp_path / f"in/{name}.jpg")
    read_bytes = files.Path.read_bytes

    def refuse(path):
        if path.name == "b.jpg":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(files.Path, "read_bytes", refuse)
    outcome = predict_files(predictor, tmp_path / "in", tmp_path / "out")
    assert outcome.images == 2 and outcome.failed == {"b.jpg": "Permission denied"}


def test_a_folder_that_cannot_be_listed_does_not_stop_the_rest(tmp_path, predictor, monkeypatch):
    for name in ("a", "b/x", "c"):
        photo(tmp_path / f"in/{name}.jpg")
    scandir = os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("/b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    outcome = predict_files(predictor, tmp_path / "in", tmp_path / "out")
    assert outcome.images == 2 and list(outcome.failed) == ["b/"]
    assert "Permission denied" in outcome.failed["b/"]


# Memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_out_of_memory_for_one_image_does_not_stop_the_rest(tmp_path, predictor, error, batch_size):
    for number, name in enumerate("abc"):
        photo(tmp_path / f"in/{name}.png", seed=number)
    large = np.asarray(Image.open(tmp_path / "in/b.png"))

    class Small(Predictor):
        def predict_batch(self, images, *, prepared=None):
            if any((image == large).all() for image in images):
                raise error
            return super().predict_batch(images, prepared=prepared)

    small = Small(predictor.model, device="cpu", input_size=28)
    outcome = predict_files(small, tmp_path / "in", tmp_path / "out", batch_size=batch_size)
    assert outcome.images == 2 and list(outcome.failed) == ["b.png"]
    assert "memory" in outcome.failed["b.png"]


def test_other_errors_of_the_network_stop_the_run(tmp_path, predictor):
    photo(tmp_path / "a.png")

    class Broken(Predictor):
        def predict_batch(self, images, *, prepared=None):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        predict_files(
            Broken(predictor.model, device="cpu", input_size=28), tmp_path / "a.png", tmp_path / "out"
        )


def test_an_image_too_large_for_memory_is_refused_before_decoding(tmp_path, predictor, monkeypatch):
    photo(tmp_path / "in/a.png")
    Image.fromarray(np.zeros((7000, 7000), np.uint8)).save(tmp_path / "in/large.png")
    monkeypatch.setattr(memory, "free_memory", lambda: 1 << 30)
    decode, decoded = files.decode_image, []
    monkeypatch.setattr(files, "decode_image", lambda data: (decoded.append(1), decode(data))[1])
    outcome = predict_files(predictor, tmp_path / "in", tmp_path / "out")
    assert outcome.images == len(decoded) == 1
    assert list(outcome.failed) == ["large.png"] and "49 megapixels" in outcome.failed["large.png"]
