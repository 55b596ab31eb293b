"""Readers of map files: exact values of the reference writers, and a MapError for other files."""

import io
import struct
import zlib

import cv2
import h5py
import numpy as np
import OpenEXR
import pytest
from made_raw import exr, hdf5, room
from PIL import Image

from depth_anything.ingest import maps
from depth_anything.ingest.maps import (
    MapError,
    read_exr,
    read_hdf5,
    read_map,
    read_map_size,
    read_npy,
    read_pfm,
    read_png16,
)

DEPTH = room((23, 31)).astype(np.float32)
DEPTH[0, :4] = [0, -1.5, np.nan, np.inf]
LEVELS = np.arange(23 * 31, dtype=np.uint16).reshape(23, 31) * 90 + 7


def same(found, true):
    np.testing.assert_array_equal(found, true, strict=True)
    assert found.flags.c_contiguous and found.dtype.isnative


def pfm(values, order="<", scale=1.0, gap=b"\n"):
    """The format in full: rows from the bottom, the sign of the scale for the order of bytes."""
    sign = -scale if order == "<" else scale
    height, width = values.shape
    header = gap.join([b"Pf", b"%d %d" % (width, height), b"%g" % sign]) + b"\n"
    return header + values[::-1].astype(f"{order}f4").tobytes()


def npy(values, **options):
    out = io.BytesIO()
    np.lib.format.write_array(out, values, **options)
    return out.getvalue()


def png(values):
    return cv2.imencode(".png", values)[1].tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("gap", [b"\n", b" ", b"\r\n", b" \n "])
def test_pfm_values_are_exact_for_any_byte_order_and_separator(order, gap):
    same(read_pfm(pfm(DEPTH, order, gap=gap)), DEPTH)


def test_a_pfm_of_opencv_and_a_pfm_with_another_scale(tmp_path):
    assert cv2.imwrite(str(tmp_path / "a.pfm"), DEPTH)
    same(read_pfm(tmp_path / "a.pfm"), DEPTH)
    same(read_pfm(pfm(DEPTH, scale=0.003922)), DEPTH)


def test_pfm_pixels_that_look_like_white_space():
    blank = np.frombuffer(b"\n\n\n\n" * 6, "<f4").reshape(2, 3).astype(np.float32)
    same(read_pfm(pfm(blank)), blank)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint32])
@pytest.mark.parametrize("name", ["Y", "Z", "G", "ViewLayer.Depth.Z"])
def test_an_exr_with_one_channel(tmp_path, dtype, name):
    values = LEVELS.astype(dtype)
    exr(tmp_path / "a.exr", {name: values})
    same(read_exr(tmp_path / "a.exr"), values)
    same(read_exr((tmp_path / "a.exr").read_bytes(), channel=name), values)


def test_an_exr_with_several_channels(tmp_path):
    exr(tmp_path / "grey.exr", dict.fromkeys("RGB", DEPTH) | {"A": np.ones_like(DEPTH)})
    same(read_exr(tmp_path / "grey.exr"), DEPTH)
    exr(tmp_path / "two.exr", {"R": DEPTH, "Z": DEPTH + 1})
    same(read_exr(tmp_path / "two.exr", channel="Z"), DEPTH + 1)
    with pytest.raises(ValueError, match=r"\(R, Z\)"):
        read_exr(tmp_path / "two.exr")
    with pytest.raises(ValueError, match='"depth", .*R, Z'):
        read_exr(tmp_path / "two.exr", channel="depth")


def test_an_exr_that_is_a_crop_is_rejected(tmp_path):
    window = (np.array([2, 3], np.int32), np.array([32, 25], np.int32))
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage, "dataWindow": window}
    with OpenEXR.File(header, {"Y": DEPTH}) as file:
        file.write(str(tmp_path / "a.exr"))
    with pytest.raises(ValueError, match=r"\[2, 3\] to \[32, 25\]"):
        read_exr(tmp_path / "a.exr")


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">u2", "<u2", "<i4", "u1", "<i8"])
@pytest.mark.parametrize("shape", [(23, 31), (23, 31, 1), (1, 23, 31)])
def test_an_npy_of_any_numeric_type_and_order(dtype, shape):
    values = (LEVELS % 250).astype(dtype)
    true = values.astype(np.dtype(dtype).newbyteorder("="))
    same(read_npy(npy(values.reshape(shape))), true)
    same(read_npy(npy(np.asfortranarray(values.reshape(shape)))), true)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_an_npy_of_format_version_1_and_2(version):
    same(read_npy(npy(DEPTH, version=version)), DEPTH)


def test_a_16_bit_png_of_opencv_and_pillow():
    same(read_png16(png(LEVELS)), LEVELS)
    out = io.BytesIO()
    Image.fromarray(LEVELS).save(out, "PNG")
    same(read_png16(out.getvalue()), LEVELS)


def test_hdf5_with_and_without_a_key(tmp_path):
    half = DEPTH.astype(np.float16)
    hdf5(tmp_path / "a.h5", half)
    same(read_hdf5(tmp_path / "a.h5"), half)
    same(read_hdf5((tmp_path / "a.h5").read_bytes(), "dataset"), half)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["cameras/0/depth"] = DEPTH[None]
    same(read_hdf5(tmp_path / "a.h5", "/cameras/0/depth"), DEPTH)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["other"] = DEPTH
    with pytest.raises(ValueError, match="cameras, dataset, other"):
        read_hdf5(tmp_path / "a.h5")
    for key in ("depth", "cameras/1", "dataset/depth", "cameras", ""):
        with pytest.raises(ValueError, match="dataset|holds 0"):
            read_hdf5(tmp_path / "a.h5", key)


def test_hdf5_does_not_open_other_files(tmp_path):
    hdf5(tmp_path / "secret.h5", DEPTH)
    layout = h5py.VirtualLayout(DEPTH.shape, np.float32)
    layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "dataset", DEPTH.shape)
    (tmp_path / "secret.raw").write_bytes(DEPTH.tobytes())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["link"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "dataset")
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset(
            "raw", DEPTH.shape, np.float32, external=[(str(tmp_path / "secret.raw"), 0, DEPTH.nbytes)]
        )
    with h5py.File(tmp_path / "a.h5", "r") as file:  # h5py reads them: the check is ours
        assert all((file[name][()][1:] == DEPTH[1:]).all() for name in ("link", "virtual", "raw"))
    with pytest.raises(ValueError, match='"link"'):
        read_hdf5(tmp_path / "a.h5", "link")
    for key in ("virtual", "raw"):
        with pytest.raises(ValueError, match=f'"/{key}"'):
            read_hdf5(tmp_path / "a.h5", key)


def test_npy_does_not_unpickle(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    out = io.BytesIO()
    np.save(out, np.array([[Evil()]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        read_npy(out.getvalue())
    assert not (tmp_path / "ran").exists()


def header(shape, kind="<f4", order="False"):
    text = f"{{'descr': '{kind}', 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"


def ihdr(width, height, bits=16, colours=0):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    end = b"\0\0\0\0IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + end


@pytest.mark.parametrize(
    ("read", "data", "reason"),
    [
        (read_pfm, b"", "Pf"),
        (read_pfm, b"PF\n3 2\n-1\n" + bytes(72), "PF"),
        (read_pfm, b"Pf\n3 x\n-1\n", "width, height and scale"),
        (read_pfm, b"Pf\n3 2\n0\n" + bytes(24), "scale .* 0"),
        (read_pfm, b"Pf\n3 2\nnan\n" + bytes(24), "scale .* nan"),
        (read_pfm, b"Pf\n-3 -2\n-1\n" + bytes(24), "shape"),
        (read_pfm, b"Pf\n99999 99999\n-1\n", "shape"),
        (read_pfm, b"Pf\n30000 30000\n-1\n", "30000, 30000"),
        (read_pfm, pfm(DEPTH)[:-1], f"{23 * 31 * 4 - 1} .*{23 * 31 * 4}"),
        (read_pfm, pfm(DEPTH) + b"\n", f"{23 * 31 * 4 + 1} .*{23 * 31 * 4}"),
        (read_exr, b"\x89PNG\r\n\x1a\n", "OpenEXR"),
        (read_exr, b"\x76\x2f\x31\x01" + bytes(40), "EXR"),
        (read_npy, b"PK\x03\x04" + bytes(40), "NPY"),
        (read_npy, b"\x93NUMPY", "NPY"),
        (read_npy, header((30000, 30000)), "30000, 30000"),
        (read_npy, header((10**18, 4)), "shape"),
        (read_npy, header((4, 4)) + bytes(63), "63 bytes .* 64 "),
        (read_npy, header((4, 4), "|O") + bytes(64), "Python objects"),
        (read_npy, header((4, 4), "<c8") + bytes(128), "type <c8"),
        (read_npy, header((4, 4), "<U4") + bytes(256), "type <U4"),
        (read_npy, header((2, 2, 4)) + bytes(64), "shape"),
        (read_npy, header((16,)) + bytes(64), "shape"),
        (read_npy, header("(0, 4)"), "shape"),
        (read_npy, header("(True, 4)"), "shape"),
        (read_npy, header("__import__('os')"), "header of the NPY"),
        (read_npy, npy(np.zeros((2, 2), [("a", "<f4")])), "type|header"),
        (read_png16, b"\xff\xd8\xff", "PNG"),
        (read_png16, b"\x89PNG\r\n\x1a\n" + bytes(30), "IHDR"),
        (read_png16, png(LEVELS.astype(np.uint8)), "gray with 8 bits"),
        (read_png16, png(np.dstack([LEVELS] * 3)), "RGB with 16 bits"),
        (read_png16, png(np.dstack([LEVELS] * 4).astype(np.uint8)), "RGBA with 8 bits"),
        (read_png16, ihdr(30000, 30000), "30000, 30000"),
        (read_png16, ihdr(4, 4), "PNG"),
        (read_png16, png(LEVELS)[:-5], "PNG"),
        (read_png16, png(LEVELS)[:40], "PNG"),
        (read_hdf5, b"", "HDF5"),
        (read_hdf5, b"\x89HDF\r\n\x1a\n" + bytes(200), "HDF5"),
    ],
)
def test_other_and_damaged_files_raise_map_error(read, data, reason):
    with pytest.raises(MapError, match=reason) as caught:
        read(data)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_of_a_png_is_detected():
    data = bytearray(png(LEVELS))
    data[len(data) // 2] ^= 1
    with pytest.raises(ValueError, match="PNG"):
        read_png16(bytes(data))


def test_hdf5_datasets_that_are_not_maps_are_rejected(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["text"] = "far"
        file["cube"] = np.zeros((2, 3, 4))
        file["compound"] = np.zeros((2, 3), [("z", "f4")])
        file.create_dataset("huge", (30000, 30000), "f4", chunks=(100, 100))
        file.create_dataset("long", (4000, 4000), "f4", chunks=(4000, 4000), compression="gzip")
        file.create_dataset("pieces", (4, 4), "f4", chunks=(1 << 14, 1 << 13), maxshape=(None, None))
    for key, reason in {
        "text": "shape",
        "cube": "shape",
        "compound": "type",
        "huge": "30000, 30000",
        "pieces": "16384, 8192",
    }.items():
        with pytest.raises(ValueError, match=reason):
            read_hdf5(path, key)
    assert read_hdf5(path, "long").shape == (4000, 4000)


@pytest.mark.parametrize("ending", maps.MAP_SUFFIXES)
def test_the_size_is_read_from_the_header(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    match ending:
        case ".png":
            path.write_bytes(png(LEVELS))
        case ".npy":
            path.write_bytes(npy(DEPTH[..., None]))
        case ".pfm":
            path.write_bytes(pfm(DEPTH))
        case ".exr":
            exr(path, {"Y": DEPTH})
        case _:
            hdf5(path, DEPTH)
    assert read_map_size(path) == read_map(path).shape == (23, 31)
    path.write_bytes(path.read_bytes()[:8])
    with pytest.raises(ValueError, match=r"\w"):
        read_map_size(path)
    with pytest.raises(ValueError, match="No such file"):
        read_map_size(tmp_path / f"b{ending}")


def test_missing_large_and_special_files_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="not a regular file"):
        read_map(tmp_path)
    with pytest.raises(ValueError, match="No such file"):
        read_map(tmp_path / "a.npy")
    with open(tmp_path / "large.npy", "wb") as file:
        file.truncate(maps.MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match="512 MiB"):
        read_map(tmp_path / "large.npy")


@pytest.mark.parametrize("ending", [".pfm", ".npy", ".png"])
def test_a_damaged_file_is_a_map_or_an_error(ending):
    whole = {".pfm": pfm(DEPTH), ".npy": npy(DEPTH), ".png": png(LEVELS)}[ending]
    read = {".pfm": read_pfm, ".npy": read_npy, ".png": read_png16}[ending]
    rng = np.random.Generator(np.random.PCG64(4))
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), 300), 3):
            data[place] = rng.integers(0, 256)
        try:
            assert read(bytes(data[: rng.integers(1, 2 * len(data))])).ndim == 2
        except ValueError as error:
            assert str(error)
