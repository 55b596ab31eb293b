"""The YAML file of a user's own set: its keys and the errors about them."""

import math

import pytest

from depth_anything.ingest.declaration import load_declaration

LEAST = "images: rgb\ndepth: depth\n"


def declared(tmp_path, text):
    path = tmp_path / "set.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_declaration(path)


def test_required_keys_alone_and_all_keys(tmp_path):
    least = declared(tmp_path, LEAST + "unit: mm\n")
    assert (least.folder, least.images, least.depth, least.scale) == (tmp_path, "rgb", "depth", 0.001)
    assert (least.quantity, least.distance, least.invalid, least.sky) == ("depth", "planar", (), None)
    most = declared(
        tmp_path,
        "name: yard\nimages: rgb/{stem}.jpg\ndepth: z/{stem}.exr\nquantity: depth\nscale: 1/256\n"
        "invalid: [65535, -1, nan]\nsky: .inf\nintrinsics: {fx: 525, fy: 524.5, cx: 319.5, cy: 2.4e2}\n"
        "distance: ray\nkey: a/b\nchannel: Z\nlicence: CC-BY-4.0\n",
    )
    assert (most.name, most.scale, most.sky, most.distance) == ("yard", 1 / 256, math.inf, "ray")
    assert most.invalid[:2] == (65535, -1) and math.isnan(most.invalid[2])
    assert most.intrinsics == (525, 524.5, 319.5, 240)
    assert (most.key, most.channel, most.licence) == ("a/b", "Z", "CC-BY-4.0")


@pytest.mark.parametrize(
    ("text", "scale"),
    [
        ("unit: m", 1),
        ("unit: cm", 0.01),
        ("unit: 0.0002", 0.0002),
        ("unit: 1e-3", 0.001),
        ("scale: 1/256", 1 / 256),
        ("scale: 1 / 1000", 0.001),
        ("quantity: disparity", 1),
        ("quantity: disparity\nscale: 1/256", 1 / 256),
    ],
)
def test_unit_and_scale_give_meters_per_stored_unit(tmp_path, text, scale):
    assert declared(tmp_path, LEAST + text).scale == scale


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("image: rgb\ndepth: d\nunit: m", '"image".* images'),
        (LEAST + "units: m", '"units".* unit'),
        (LEAST + "unit: m\nsky_form: 3", "sky_form.* sky_from"),
        (LEAST + "unit: m\nlicense: MIT", "license.* licence"),
        (LEAST + "unit: m\nqqq: 1", r'"qqq"\. .*name, images'),
        (LEAST + "unit: m\n1: 1", '"1"'),
        (LEAST + "unit: m\n[1, 2]: 1", "set.yaml"),
        (LEAST, "unit .*  unit: m, cm or mm"),
        (LEAST + "unit:", "  unit: m, cm or mm"),
        (LEAST + "unit: feet", "unit: feet"),
        (LEAST + "unit: [m]", "unit: "),
        (LEAST + "unit: true", "unit: True"),
        (LEAST + "scale: 0", "scale: 0 "),
        (LEAST + "scale: -1", "scale: -1 "),
        (LEAST + "scale: .nan", "scale: nan"),
        (LEAST + "scale: .inf", "scale: inf"),
        (LEAST + "scale: 1/0", "scale: 1/0"),
        (LEAST + "unit: m\nscale: 1", "unit and scale"),
        (LEAST + "quantity: disparity\nunit: m", "unit: m: disparity"),
        (LEAST + "quantity: inverse\nunit: m", "quantity: inverse.* depth or disparity"),
        (LEAST + "unit: m\ndistance: euclidean", "distance: euclidean.* planar or ray"),
        (LEAST + "unit: m\ndistance: ray", "distance: ray.*  intrinsics: "),
        (LEAST + "unit: m\nintrinsics: 525", "intrinsics .*fx: 525"),
        (LEAST + "unit: m\nintrinsics: {fx: 1, fy: 1, cx: 1}", "intrinsics .*fx: 525"),
        (LEAST + "unit: m\nintrinsics: [0, 1, 1, 1]", "fx and fy"),
        (LEAST + "unit: m\ninvalid: far", "invalid: far"),
        (LEAST + "unit: m\nsky: 5\nsky_from: 6", "sky .*sky_from"),
        (LEAST + "unit: m\nsky: 5\ninvalid: [0, 5]", " 5 .*invalid .*sky"),
        (LEAST + "unit: m\nsky_from: 5\ninvalid: 6", " 6 .*invalid .*sky"),
        (LEAST + "quantity: disparity\nsky_from: 5", "  sky: 0"),
        (LEAST + "unit: m\nlicence: free for all", "SPDX"),
        (LEAST + "unit: m\nname: 2024-01-01", "name: "),
        (LEAST + "unit: m\nunit: mm", 'line 4: .*"unit"'),
        ("depth: d\nunit: m", "  images: rgb"),
        ("images: d\nunit: m", "  depth: depth"),
        ("images: [a, b]\ndepth: d\nunit: m", "images: "),
        ("images: {stem}.jpg\ndepth: d", "set.yaml"),
        ("rgb", "  images: rgb"),
        ("", "  images: rgb"),
        ("- a\n- b", "  images: rgb"),
        ("images: [", "set.yaml"),
        ("a: !!python/object/apply:os.system [ls]", "os.system"),
        (b"\xff\xfe\x00a", "set.yaml"),
        ("unit: " + "1" * 5000, "set.yaml"),
        ("a: " * 200_000, "set.yaml"),
        ("[" * 5000, "set.yaml"),
        ("#" * (1 << 20) + "#", "1 MiB"),
    ],
)
def test_an_error_names_the_file_and_the_key(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        declared(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "set.yaml")) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/set.yaml: No such file or directory"):
        load_declaration(tmp_path / "set.yaml")
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_declaration(tmp_path)
