"""Copies of models that an address in an object store names."""

import os
from pathlib import Path

import pytest
from local_servers import FaultyServer, free_port

from depth_anything import DepthAnything, load_model, save_model
from depth_anything.data import local_copy
from depth_anything.data.address import with_addresses
from depth_anything.data.local_copy import UNUSED_S, local_path
from depth_anything.data.store import ObjectStore
from depth_anything.data.tars import ShardError, StorageUnavailable
from depth_anything.errors import UserError
from depth_anything.model.sharded_files import STATE_NAME


@pytest.fixture
def runs(s3_prefix: str) -> ObjectStore:
    return ObjectStore(f"{s3_prefix}/runs")


def test_a_file_is_fetched_once_and_again_when_it_has_changed(
    runs: ObjectStore, faulty_s3: FaultyServer
) -> None:
    runs.write("teacher/model.safetensors", b"first")
    runs.write("teacher/config.yaml", b"stage: teacher\n")
    address = f"{runs.root}/teacher/model.safetensors"
    path = local_path(address)
    assert path.read_bytes() == b"first" and path.parts[-2:] == ("teacher", "model.safetensors")
    assert (path.parent / "config.yaml").read_text() == "stage: teacher\n"
    assert with_addresses(f"{path} is damaged") == f"{address} is damaged"
    runs.write("teacher/model.safetensors", b"second")
    assert local_path(address) == path  # of this process, which has perhaps read it already

    local_copy._copies.clear()
    new = local_path(address)
    assert new != path and new.read_bytes() == b"second" and path.read_bytes() == b"first"
    local_copy._copies.clear()
    faulty_s3.seen.clear()
    assert local_path(address) == new and not faulty_s3.seen  # no GET: only asked for


def test_copies_of_versions_that_nobody_uses_are_deleted(runs: ObjectStore) -> None:
    address, copies = f"{runs.root}/teacher/model.safetensors", []
    for number in range(3):
        runs.write("teacher/model.safetensors", b"%d" % number)
        local_copy._copies.clear()
        copies.append(local_path(address))
        if number == 0:
            old = copies[0].parents[1]
            os.utime(old, (0, old.stat().st_mtime - UNUSED_S - 1))
    assert [path.exists() for path in copies] == [False, True, True]


def test_a_fetch_that_was_interrupted_begins_again(
    runs: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.safetensors", "config.json"):
        runs.write(f"hub/{name}", b"{}")
    download = ObjectStore.download

    def interrupt(store: ObjectStore, name: str, path: Path) -> None:
        if name.endswith("config.json"):
            raise KeyboardInterrupt
        download(store, name, path)

    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "download", interrupt)
        with pytest.raises(KeyboardInterrupt):
            local_path(f"{runs.root}/hub")
    assert sorted(path.name for path in local_path(f"{runs.root}/hub/").iterdir()) == [
        "a.safetensors",
        "config.json",
    ]


def test_only_the_objects_of_a_model_are_fetched(runs: ObjectStore) -> None:
    names = ("config.yaml", "model.safetensors", "best.safetensors", "metrics.csv")
    for name in (*names, "checkpoints/step-000000005.ckpt"):
        runs.write(f"student/{name}", b"stage: student\n")
    for name in ("config.json", "model.safetensors", "README.md", "onnx/model.onnx", "tf_model.h5"):
        runs.write(f"hub/{name}", b"{}")
    sharded = "fsdp/checkpoints/step-000000005.ckpt"
    runs.write("fsdp/config.yaml", b"stage: teacher\n")
    for name in (STATE_NAME, "0.shard"):
        runs.write(f"{sharded}/{name}", b"shard")

    def fetched(address: str) -> list[str]:
        copy = local_path(address)
        assert copy.exists()
        return sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*"))

    assert fetched(f"{runs.root}/student") == ["config.yaml", "model.safetensors"]
    assert fetched(f"{runs.root}/hub") == ["README.md", "config.json", "model.safetensors"]
    assert fetched(f"{runs.root}/{sharded}") == sorted(["0.shard", STATE_NAME])
    assert (local_path(f"{runs.root}/{sharded}").parents[1] / "config.yaml").exists()
    runs.write("file.ckpt", b"{}")
    assert local_path(f"{runs.root}/file.ckpt").read_bytes() == b"{}"


def test_what_is_no_model_is_named(runs: ObjectStore) -> None:
    runs.write("running/config.yaml", b"stage: teacher\n")
    runs.write("set/manifest.json", b"{}")
    for place, text in (
        ("nothing", "there is no model at"),
        ("running", "is not finished and has no model.safetensors yet"),
        ("set", "holds no model; it has manifest.json"),
    ):
        with pytest.raises(ShardError, match=text) as error:
            local_path(f"{runs.root}/{place}")
        assert f"{runs.root}/{place}" in error.value.what and error.value.fix
    with pytest.raises(ShardError, match="there is no model at s3://bucket;"):
        local_path("s3://bucket")
    with pytest.raises(UserError, match=r"^https://host/m.pth\?\*\*\*: models are .*download it") as refused:
        local_path("https://host/m.pth?signature=hidden")
    assert "hidden" not in str(refused.value)
    assert local_path("file:///a/b.pth") == Path("/a/b.pth") and local_path("a/b.pth") == Path("a/b.pth")


def test_denied_access_and_an_unreachable_store_name_the_address_and_no_secret(
    runs: ObjectStore,
    faulty_s3: FaultyServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    runs.write("teacher/model.safetensors", b"weights")
    address = f"{runs.root}/teacher/model.safetensors"
    faulty_s3.fault = lambda path, times: "403" if path.endswith("model.safetensors") else None
    messages = []
    with pytest.raises(ShardError, match="access denied") as denied:
        local_path(address)
    messages.append(str(denied.value))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    local_copy._copies.clear()
    import fsspec

    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(StorageUnavailable, match="cannot be") as unreachable:
        local_path(address)
    messages.append(str(unreachable.value))
    for message in [*messages, capfd.readouterr().err]:
        assert "up-and-secret" not in message and "\n" not in message.strip()
    assert all(address in message for message in messages)


def test_a_model_is_loaded_from_an_address_and_errors_name_it(runs: ObjectStore, tmp_path: Path) -> None:
    model = DepthAnything("vitn")
    save_model(model, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    runs.write("student/model.safetensors", data)
    runs.write("cut/model.safetensors", data[:-100])
    for address in (f"{runs.root}/student", f"{runs.root}/student/model.safetensors"):
        loaded = load_model(address)
        assert loaded.encoder == "vitn" and loaded.state_dict().keys() == model.state_dict().keys()
    for address in (f"{runs.root}/cut", f"{runs.root}/cut/model.safetensors"):
        with pytest.raises(ValueError) as error:
            load_model(address)
        assert address in str(error.value) and str(local_copy.cache_folder()) not in str(error.value)
