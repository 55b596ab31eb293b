"""Writing sets of shards to an object store."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from made_source import write

from depth_anything.cli import main
from depth_anything.data.reader import Records
from depth_anything.data.shards import open_set, verify_set
from depth_anything.data.store import ObjectStore
from depth_anything.data.tars import ShardError
from depth_anything.ingest.captions import write_captioned_set
from depth_anything.scenes.render import write_scenes
from depth_anything.scenes.scene_set import SceneSetSpec

NAMES_ALSO_LOCAL = ("settings.json", "about.json", "listing.txt", "listing.json", "manifest.json")


def objects(root):
    place = ObjectStore(root)
    return {name: place.read(name) for name in place.names()}


def files(root):
    return {path.name: path.read_bytes() for path in Path(root).iterdir()}


def names_put(server, ending):
    """Return the names of the objects that were written, but for parts, whose addresses have a query."""
    written = [path.rpartition("/")[2] for method, path in server.writes if method == "PUT"]
    return sorted(name for name in written if name.endswith(ending))


def test_a_set_has_the_bytes_that_it_has_on_a_disk(raw, whole, s3_prefix, faulty_s3):
    written = write(raw, s3_prefix)
    assert objects(s3_prefix) == files(whole.root) and written.digest == whole.digest
    assert Records(written).read("toy/00002", 1) == Records(whole).read("toy/00002", 1)
    assert verify_set(s3_prefix, decode=True) == []
    order = [path.rpartition("/")[2] for method, path in faulty_s3.writes if method == "PUT"]
    assert order[-1] == "manifest.json" and order.index("00000.tar") < order.index("00000.idx")
    faulty_s3.writes.clear()
    assert write(raw, s3_prefix).digest == whole.digest and not faulty_s3.writes  # it is finished
    with pytest.raises(ShardError, match="per_shard 4 in place of 5"):
        write(raw, s3_prefix, per_shard=5)
    assert objects(s3_prefix) == files(whole.root)


def test_parts_share_an_address_and_the_last_one_finishes_the_set(raw, whole, s3_prefix):
    assert write(raw, s3_prefix, part=(2, 2)) is None and "manifest.json" not in objects(s3_prefix)
    with pytest.raises(ShardError, match="not found"):
        open_set(s3_prefix)
    written = write(raw, s3_prefix, part=(1, 2))
    assert written is not None and objects(s3_prefix) == files(whole.root)


def test_two_processes_write_one_set_at_the_same_time(raw, whole, s3_prefix):
    with ThreadPoolExecutor(2) as pool:
        for written in pool.map(lambda _: write(raw, s3_prefix), range(2)):
            assert written is None or written.digest == whole.digest
    assert write(raw, s3_prefix).digest == whole.digest and objects(s3_prefix) == files(whole.root)


@pytest.mark.parametrize(("ending", "last"), [("00003.tar", "00002.idx"), ("00004.idx", "00004.tar")])
def test_a_killed_writer_leaves_no_half_shard_and_is_continued(
    raw, whole, s3_prefix, faulty_s3, ending, last
):
    """It is killed while a tar is sent, or between a tar and its index."""
    process = multiprocessing.get_context("fork").Process(target=write, args=(raw, s3_prefix))

    def fault(request, times):
        if request.startswith("PUT") and request.endswith(ending):
            process.kill()
            return "reset"
        return None

    faulty_s3.write_fault = fault
    process.start()
    process.join(120)
    assert process.exitcode == -9
    process.close()
    names = ObjectStore(s3_prefix).names()
    assert last in names and ending not in names and "manifest.json" not in names
    faulty_s3.write_fault = lambda request, times: None
    faulty_s3.writes.clear()
    assert write(raw, s3_prefix).digest == whole.digest and objects(s3_prefix) == files(whole.root)
    made = [name for name in ("00003.idx", "00004.idx", "00005.idx") if name >= ending[:5]]
    assert names_put(faulty_s3, ".idx") == made  # finished shards are not made again


def test_a_tar_of_other_content_is_not_replaced(raw, s3_prefix):
    ObjectStore(s3_prefix).write("settings.json", b"")  # as if another program had begun
    with pytest.raises(ShardError, match="settings.json"):
        write(raw, s3_prefix)
    ObjectStore(s3_prefix).delete("settings.json")
    assert write(raw, s3_prefix, part=(2, 2)) is None
    ObjectStore(s3_prefix).write("00000.tar", b"another program's")
    with pytest.raises(ShardError, match="00000.tar has other content"):
        write(raw, s3_prefix)
    assert objects(s3_prefix)["00000.tar"] == b"another program's"
    assert "manifest.json" not in objects(s3_prefix)


def test_scenes_captions_and_the_command(s3_prefix, tmp_path, capsys):
    spec = SceneSetSpec(look="synthetic", count=3, seed=1, height=28, width=28)
    local = write_scenes(tmp_path / "scenes", spec, per_shard=2)
    assert write_scenes(f"{s3_prefix}/scenes", spec, per_shard=2).digest == local.digest
    captions = tmp_path / "captions.csv"
    keys = [Records(local).read("scenes/00000", index)[0] for index in range(2)]
    captions.write_text("file,caption\n" + "".join(f"{key},a scene\n" for key in keys))
    same = [
        write_captioned_set(str(tmp_path / "scenes"), captions, root, name="told")
        for root in (tmp_path / "told", f"{s3_prefix}/told")
    ]
    assert same[0].digest == same[1].digest and objects(f"{s3_prefix}/told") == files(tmp_path / "told")
    arguments = ["shard", "scenes", f"{s3_prefix}/cli", "--count", "2", "--size", "28", "28"]
    assert main(arguments) in (0, None) and f"{s3_prefix}/cli" in capsys.readouterr().out
    assert open_set(f"{s3_prefix}/cli").records == 2
    assert main(["merge", f"{s3_prefix}/cli", "part"]) not in (0, None)
