"""Limits on the memory that a hostile or damaged file can use, checked before the memory is allocated."""

import io
import sys
import tarfile
import tracemalloc
import zipfile
import zlib

import h5py
import numpy as np
import OpenEXR
import pytest
from made_custom import make_set
from made_raw import exr
from PIL import Image
from shard_builders import make

from depth_anything.data.shards import open_set, verify_set
from depth_anything.data.tars import ShardError, index_shard
from depth_anything.evaluation.benchmarks import ddad, nyu
from depth_anything.ingest import archive_io, custom, maps
from depth_anything.ingest.declaration import load_declaration
from depth_anything.ingest.find_files import find_images
from depth_anything.ingest.frame_files import check_map_size
from depth_anything.ingest.maps import read_exr, read_hdf5, read_map_size
from depth_anything.ingest.record import is_plain_rgb
from depth_anything.ingest.sets import hypersim
from depth_anything.inspect import dataset_stats as stats_module
from depth_anything.inspect.dataset_check import check_dataset
from depth_anything.inspect.dataset_stats import compute_stats


@pytest.fixture
def allowance():
    """Python's and numpy's own allocations stay below 64 MiB."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20


def zeros(path, count, size):
    exr(path, {f"c{number:02d}": np.zeros(size, np.float32) for number in range(count)})
    return path


@pytest.mark.parametrize("act", [read_exr, lambda path: read_exr(path, channel="c04"), read_map_size])
def test_an_exr_with_gigabytes_of_channels_is_rejected_by_its_header(tmp_path, monkeypatch, act):
    """60 channels of 4096 x 4096 zeros are 4 MB in a file; the limit is lowered here, so that a small file suffices."""
    path = zeros(tmp_path / "a.exr", 60, (32, 64))
    assert act(path) is not None
    plain = OpenEXR.File

    def header_only(path, separate, header, threads):
        assert header, "its pixels are read"
        return plain(path, separate, header, threads)

    monkeypatch.setattr(OpenEXR, "File", header_only)
    monkeypatch.setattr(maps, "_MAX_EXR_BYTES", 60 * 32 * 64 * 4 - 1)
    with pytest.raises(ValueError, match="60 channels of 64 x 32"):
        act(path)


def test_the_exr_limit_accepts_large_renderings():
    assert 50 * 1080 * 1920 * 4 < maps._MAX_EXR_BYTES < 60 * 4096 * 4096 * 4


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (BOMB + "images: *i\n", "alias"),
        ("images: rgb\ndepth: depth\nunit: m\ninvalid: &x [*x]\n", "alias"),
        ("base: &b {unit: m}\nimages: rgb\n<<: *b\n", "alias"),
        ("images: rgb\ninvalid: [" + "1, " * 20_000 + "1]\n", "10000"),
        ("images: rgb\ninvalid: 1" + ":10" * 100_000 + "\n", "4096"),
        ("images: " + "[" * 5_000 + "\n", "set.yaml"),
    ],
    ids=["bomb", "itself", "merge", "values", "base 60", "nested"],
)
def test_a_declaration_that_expands_to_gigabytes_is_rejected(tmp_path, text, value):
    assert len(BOMB) < 600
    (tmp_path / "set.yaml").write_text(text)
    with pytest.raises(ValueError, match=value) as error:
        load_declaration(tmp_path / "set.yaml")
    assert len(str(error.value)) < 400


def packed_zeros(size):
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()


def piece(path, data, *, shape=(64, 64), chunks=(64, 64), kind="<f4"):
    """An HDF5 dataset of one compressed piece, written as it is."""
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("dataset", shape, kind, chunks=chunks, compression="gzip")
        dataset.id.write_direct_chunk((0,) * len(shape), data)
    return path


def test_an_hdf5_chunk_that_decompresses_to_more_than_its_size_is_rejected(tmp_path, allowance):
    honest = zlib.compress(np.arange(4096, dtype="<f4").tobytes())
    assert (read_hdf5(piece(tmp_path / "a.h5", honest)).ravel() == np.arange(4096)).all()
    bomb = packed_zeros(1 << 28)
    with pytest.raises(ValueError, match="more than its size"):
        read_hdf5(piece(tmp_path / "b.h5", bomb))
    colour = piece(tmp_path / "c.h5", bomb, shape=(8, 8, 3), chunks=(8, 8, 3))
    with pytest.raises(ValueError, match="more than its size"):
        hypersim._read_color(colour.read_bytes())


def test_all_supported_hdf5_filters_are_read(tmp_path):
    values = np.random.default_rng(1).normal(size=(70, 50)).astype(np.float32)
    kinds = [
        {},
        {"chunks": (16, 16)},
        {"compression": "gzip"},
        {"compression": "gzip", "shuffle": True, "fletcher32": True, "chunks": (32, 50)},
        {"compression": "lzf"},
    ]
    for number, options in enumerate(kinds):
        path = tmp_path / f"{number}.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("dataset", data=values, **options)
        assert (read_hdf5(path) == values).all()


def lzf_piece(path, packed, *, mask=0):
    """A map of one chunk of 64 bytes, declared as compressed with lzf."""
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("dataset", (4, 4), "<f4", chunks=(4, 4), compression="lzf")
        dataset.id.write_direct_chunk((0, 0), packed, mask)
    return path


def test_an_lzf_chunk_that_decompresses_to_more_than_its_size_is_rejected(tmp_path, monkeypatch, allowance):
    values = np.arange(16, dtype="<f4").tobytes()
    assert read_hdf5(lzf_piece(tmp_path / "plain.h5", values, mask=1)).ravel().tolist() == list(range(16))
    bomb = b"\0\0" + b"\xe0\xff\0" * 1_000_000  # each three bytes repeat the last byte 264 times
    with pytest.raises(ValueError, match="3000002 bytes"):
        read_hdf5(lzf_piece(tmp_path / "bomb.h5", bomb))
    small = np.zeros((64, 64), np.float32)
    with h5py.File(tmp_path / "large.h5", "w") as file:
        file.create_dataset("dataset", data=small, chunks=(64, 64), compression="lzf")
    assert (read_hdf5(tmp_path / "large.h5") == 0).all()
    monkeypatch.setattr(maps, "_MAX_LZF_BYTES", 100)
    with pytest.raises(ValueError, match="lzf"):
        read_hdf5(tmp_path / "large.h5")


def test_hdf5_filters_of_unknown_cost_are_rejected(tmp_path):
    twice = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    twice.set_chunk((64, 64))
    for _ in range(2):
        twice.set_deflate(9)
    with h5py.File(tmp_path / "twice.h5", "w") as file:
        space = h5py.h5s.create_simple((64, 64))
        h5py.h5d.create(file.id, b"dataset", h5py.h5t.IEEE_F32LE, space, twice)
    with h5py.File(tmp_path / "scaled.h5", "w") as file:
        file.create_dataset("dataset", (64, 64), "i4", chunks=(64, 64), scaleoffset=4)
    for name in ("twice.h5", "scaled.h5"):
        with pytest.raises(ValueError, match="gzip, lzf"):
            read_hdf5(tmp_path / name)


def test_a_decompression_bomb_is_detected_when_another_filter_is_skipped(tmp_path, allowance):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset(
            "dataset", (64, 64), "<f4", chunks=(64, 64), shuffle=True, compression="gzip"
        )
        dataset.id.write_direct_chunk((0, 0), packed_zeros(1 << 27), 1)  # of shuffle
    with pytest.raises(ValueError, match="more than its size"):
        read_hdf5(tmp_path / "a.h5")


def test_reading_a_frame_of_nyu_costs_the_memory_of_one_frame(tmp_path, allowance):
    bomb = packed_zeros(1 << 27)
    frame = tmp_path / "00046.h5"
    with h5py.File(frame, "w") as file:
        rgb = file.create_dataset("rgb", (3, 48, 64), "u1", chunks=(3, 48, 64), compression="gzip")
        rgb.id.write_direct_chunk((0, 0, 0), bomb)
    with pytest.raises(ValueError, match="more than its size"):
        nyu._read_rgb(frame)
    with h5py.File(frame, "w") as file:
        file["rgb"] = h5py.ExternalLink("other.h5", "rgb")
    with pytest.raises(ValueError, match='"rgb"'):
        nyu._read_rgb(frame)
    whole = tmp_path / "labeled.mat"
    with h5py.File(whole, "w") as file:
        images = file.create_dataset(
            "images", (3, 3, 64, 48), "u1", chunks=(1, 3, 32, 48), compression="gzip"
        )
        file.create_dataset("depths", data=np.ones((3, 64, 48), np.float32), chunks=(1, 64, 48))
        images[0] = 7
        images.id.write_direct_chunk((1, 0, 32, 0), bomb)
    image, depth = nyu._read_matlab(str(whole), 0, "depths")
    assert image.shape == (48, 64, 3) and (image == 7).all() and (depth == 1).all()
    assert not nyu._read_matlab(str(whole), 2, "depths")[0].any()  # nothing is stored of it
    with pytest.raises(ValueError, match="more than its size"):
        nyu._read_matlab(str(whole), 1, "depths")
    nyu._open_matlab.cache_clear()


@pytest.mark.parametrize("kind", ["<f4", [("X", "<f4"), ("Y", "<f4"), ("Z", "<f4")]], ids=["plain", "fields"])
def test_a_point_cloud_with_fewer_points_than_its_header_claims_is_rejected(kind, monkeypatch):
    stream, archive = io.BytesIO(), io.BytesIO()
    claim = {"descr": kind, "fortran_order": False, "shape": (1 << 40, 3)}
    np.lib.format.write_array_header_1_0(stream, claim)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.npy", stream.getvalue() + bytes(48))
    monkeypatch.setattr(np, "load", None)
    with pytest.raises(ValueError, match="48 bytes"):
        ddad.read_points(archive.getvalue())


def claiming(path, size):
    """A tar whose long name claims so many bytes; the file is sparse."""
    info = tarfile.TarInfo("././@LongLink")
    info.size, info.type = size, tarfile.GNUTYPE_LONGNAME
    with open(path, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(size + 10240)
    return path


@pytest.mark.parametrize("size", [1 << 28, 1 << 33])
def test_a_tar_header_that_claims_gigabytes_is_reported_as_damage(tmp_path, allowance, size):
    path = claiming(tmp_path / "a.tar", size)
    with pytest.raises(ShardError, match=r"a\.tar"):
        index_shard(path)
    (line,) = find_images(tmp_path)
    assert line.startswith("a.tar\t!\tthe tar is damaged")


def test_a_tar_member_of_gigabytes_is_rejected_before_it_is_read(tmp_path, allowance):
    with pytest.raises(ValueError, match=f"{1 << 33} .*512 MiB"):
        archive_io.read_tar_member(claiming(tmp_path / "a.tar", 1 << 33), 512, 1 << 33)


def test_an_lmdb_value_is_not_copied_before_its_size_is_checked(tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "a"), map_size=1 << 24) as environment:
        with environment.begin(write=True) as transaction:
            transaction.put(b"small", b"1234")
            transaction.put(b"large", bytes(1 << 20))
    monkeypatch.setattr(archive_io, "MAX_FILE_BYTES", 1 << 19)
    assert archive_io.read_lmdb_value(tmp_path / "a", b"small") == b"1234"
    with pytest.raises(ValueError, match=str(1 << 20)):
        archive_io.read_lmdb_value(tmp_path / "a", b"large")


def test_a_record_that_exceeds_the_memory_is_one_reported_problem(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError

    shard_set = make(tmp_path / "set", shards=1)
    with monkeypatch.context() as patched:
        patched.setattr(stats_module, "decode_labels", fail)
        found = compute_stats(open_set(shard_set.root), sample=3)
    assert len(found.bad) == 3 and "memory" in found.bad[0]
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["depth_anything.data.shards"], "decode_record", fail)
        problems = verify_set(shard_set.root, decode=True)
    assert len(problems) == 5 and all("memory" in problem for problem in problems)


def test_a_map_that_exceeds_the_memory_is_rejected_alone(tmp_path, monkeypatch):
    make_set(tmp_path, yaml="unit: m\n")
    declared, plain = load_declaration(tmp_path / "set.yaml"), custom.CustomSet.read

    def read(self, raw, line):
        if line.startswith("b\t"):
            raise MemoryError
        return plain(self, raw, line)

    monkeypatch.setattr(custom.CustomSet, "read", read)
    found = check_dataset(declared)
    assert found.taken == 2 and [name for name, _ in found.refused] == ["b"]


@pytest.mark.parametrize(("height", "taken"), [(9_000, True), (11_000, False)])
def test_images_of_a_custom_set_have_the_pixel_limit_of_all_images(height, taken):
    """Of 180 and 220 megapixels, between Pillow's limit and ours."""
    photograph = io.BytesIO()
    Image.new("1", (20_000, height)).save(photograph, "PNG")
    if taken:
        assert custom.read_image_size(photograph.getvalue()) == (height, 20_000)
    else:
        with pytest.raises(ValueError, match="200 megapixels"):
            custom.read_image_size(photograph.getvalue())


def test_a_large_photograph_is_stored_unchanged(monkeypatch):
    photograph = io.BytesIO()
    Image.new("RGB", (64, 48)).save(photograph, "JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert is_plain_rgb(photograph.getvalue())
    check_map_size(photograph.getvalue(), np.ones((48, 64)), "depth")
