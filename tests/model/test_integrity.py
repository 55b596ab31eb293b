"""Damaged model files and checkpoints are detected by their digests before their tensors are used."""

import errno
import json
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from depth_anything import DepthAnything
from depth_anything.model import integrity
from depth_anything.model.integrity import find_damage, save_with_digest
from depth_anything.model.metadata import build_metadata
from depth_anything.model.tensor_files import read_tensors, save_safetensors
from depth_anything.model.weights import fingerprint, load_encoder, load_model, save_model


def content() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"pretrained.layer{i}": torch.randn(64, 65, generator=generator) for i in range(5)}
    return {"state_dict": tensors, "global_step": 7, "loops": {"a": 1}}


def written(path: Path, kind: str) -> bytes:
    """Write a file of a kind and return its bytes."""
    if kind == "checkpoint":
        save_with_digest(content(), path)
    elif kind == "old checkpoint":
        torch.save(content(), path)
    else:
        save_safetensors(content()["state_dict"], path, {"encoder": "vitn"})
    return path.read_bytes()


KINDS = ("checkpoint", "old checkpoint", "safetensors")


def test_a_checkpoint_with_a_digest_is_read_by_every_reader(tmp_path: Path) -> None:
    path, plain = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    save_with_digest(content(), path)
    with plain.open("wb") as file:
        torch.save(content(), file)
    assert find_damage(path) == find_damage(plain) == ""
    for mmap in (True, False):
        read = torch.load(path, weights_only=True, mmap=mmap)
        assert read["global_step"] == 7
        for name, tensor in content()["state_dict"].items():
            assert torch.equal(read["state_dict"][name], tensor)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"sha256:")
    # what is added is the comment and its length, and nothing depends on the name or the hour
    assert path.read_bytes()[:-73] == plain.read_bytes()[:-2]
    save_with_digest(content(), tmp_path / "other.ckpt")
    assert (tmp_path / "other.ckpt").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_anywhere_never_become_other_weights(tmp_path: Path, kind: str, seed: int) -> None:
    path, rng = tmp_path / "file", random.Random(seed)
    whole = written(path, kind)
    before = read_tensors(path)[0]
    header = 8 + int.from_bytes(whole[:8], "little") if kind == "safetensors" else 4096
    spans = [(0, len(whole)), (len(whole) // 3, len(whole) // 2), (9, header), (len(whole) - 400, len(whole))]
    for start, end in spans:
        for count in (1, 64):
            changed = bytearray(whole)
            for place in rng.sample(range(start, end), count):
                changed[place] ^= rng.randrange(1, 256)
            path.write_bytes(changed)
            if kind == "checkpoint":
                assert find_damage(path), (start, count)
            try:
                read = read_tensors(path)[0]
            except ValueError as error:
                assert str(path) in str(error)
            else:  # bytes between the records, or of the description
                assert read.keys() == before.keys()
                assert all(torch.equal(read[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_flipped_in_the_middle_of_the_tensors_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    changed = bytearray(written(path, kind))
    assert find_damage(path) == ""
    for place in range(len(changed) // 2, len(changed) // 2 + 64):
        changed[place] ^= 0x10
    path.write_bytes(changed)
    assert find_damage(path)
    with pytest.raises(ValueError, match="damaged") as raised:
        read_tensors(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("kind", ("checkpoint", "old checkpoint"))
@pytest.mark.parametrize("lost", (1, 10, 70, 72, 80, 1000, 50_000))
@pytest.mark.parametrize("how", ("cut", "zeros", "longer"))
def test_a_truncated_digest_is_damage(tmp_path: Path, kind: str, lost: int, how: str) -> None:
    path = tmp_path / "file"
    whole = written(path, kind)
    if kind == "old checkpoint" and how == "zeros" and lost < 22:
        pytest.skip("torch itself refuses a zip without its last record")
    tail = {"cut": b"", "zeros": bytes(lost), "longer": whole[-lost:] + bytes(lost)}[how]
    path.write_bytes(whole[:-lost] + tail)
    assert find_damage(path)


def test_the_digest_of_another_checkpoint_is_damage(tmp_path: Path) -> None:
    one, other = tmp_path / "1.ckpt", tmp_path / "2.ckpt"
    save_with_digest(content(), one)
    save_with_digest({**content(), "global_step": 8}, other)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(first[:-71] + second[-71:])
    other.write_bytes(second[:-71] + first[-71:].upper())
    assert find_damage(one) and find_damage(other)


def test_safetensors_without_a_digest_load(tmp_path: Path) -> None:
    state = content()["state_dict"]
    save_file(state, tmp_path / "plain.safetensors")
    save_file(state, tmp_path / "old.safetensors", metadata={"encoder": "vitn", "version": "0.1"})
    for name in ("plain", "old"):
        assert find_damage(tmp_path / f"{name}.safetensors") == ""
        assert read_tensors(tmp_path / f"{name}.safetensors")[0].keys() == state.keys()


def test_edited_metadata_load_and_edited_tensors_do_not(tmp_path: Path) -> None:
    path, copy = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_safetensors(content()["state_dict"], path, {"encoder": "vitn"})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), copy, metadata={**metadata, "licence": "mit"})
    assert read_tensors(copy)[1] == {"encoder": "vitn", "licence": "mit"}
    halves = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(halves, copy, metadata=metadata)
    with pytest.raises(ValueError, match='"sha256"'):
        read_tensors(copy)
    swapped = load_file(path)
    swapped["pretrained.layer0"], swapped["pretrained.layer1"] = (
        swapped["pretrained.layer1"],
        swapped["pretrained.layer0"],
    )
    save_file(swapped, copy, metadata=metadata)
    with pytest.raises(ValueError, match="damaged"):
        read_tensors(copy)


def test_a_zip_without_crc_records_loads(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content(), tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert find_damage(tmp_path / "a.pth") == ""
    assert read_tensors(tmp_path / "a.pth")[0]


def test_a_read_error_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_with_digest(content(), tmp_path / "a.ckpt")

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(integrity, "_hash_file", fail)
    with pytest.raises(OSError, match="Input/output error"):
        find_damage(tmp_path / "a.ckpt")
    torch.save(content(), tmp_path / "old.ckpt")
    monkeypatch.setattr(zipfile.ZipFile, "testzip", fail)
    with pytest.raises(OSError, match="Input/output error"):
        find_damage(tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_tensors(tmp_path / "old.ckpt")


def test_a_file_is_verified_once_for_each_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []
    update = integrity._hash_file
    monkeypatch.setattr(integrity, "_hash_file", lambda *a: (passes.append("pass"), update(*a)))
    path = tmp_path / "a.ckpt"
    save_with_digest(content(), path)
    assert [find_damage(path), find_damage(path), passes] == ["", "", ["pass"]]
    path.write_bytes(bytes([80, 75, 3, 4]) + path.read_bytes()[4:-1] + b"g")
    assert find_damage(path)


@pytest.mark.parametrize("use", ("load_model", "load_encoder", "fingerprint", "a run's folder"))
def test_every_function_refuses_a_damaged_model(tmp_path: Path, use: str) -> None:
    model, path = DepthAnything("vitn"), tmp_path / "model.safetensors"
    save_model(model, path)
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ValueError, match="damaged") as raised:
        if use == "load_encoder":
            load_encoder(DepthAnything("vitn"), path)
        elif use == "fingerprint":
            fingerprint(path)
        else:
            load_model(tmp_path if use == "a run's folder" else path)
    assert str(path) in str(raised.value)


def test_every_format_that_is_saved_holds_a_digest_or_crc_records(tmp_path: Path) -> None:
    model = DepthAnything("vitn")
    save_model(model, tmp_path / "m.safetensors")
    save_model(model, tmp_path / "hf", format="transformers")
    save_model(model, tmp_path / "m.pth", format="official")
    checkpoint = {"state_dict": model.state_dict(), "depth_anything": build_metadata(model)}
    save_with_digest(checkpoint, tmp_path / "m.ckpt")
    for name in ("m.safetensors", "hf/model.safetensors", "m.pth", "m.ckpt"):
        path = tmp_path / name
        assert find_damage(path) == ""
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] + bytes(64) + whole[len(whole) // 2 + 64 :])
        assert find_damage(path), name


def test_the_digest_is_of_the_tensors_alone(tmp_path: Path) -> None:
    digests = []
    for number, metadata in enumerate(({"encoder": "vitn"}, {"encoder": "vitt", "more": "x" * 1000})):
        path = tmp_path / f"{number}.safetensors"
        save_safetensors(content()["state_dict"], path, metadata)
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        digests.append(header["__metadata__"]["sha256"])
    assert digests[0] == digests[1]
