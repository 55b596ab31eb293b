"""The yaml of a user's own set: what it says, and what is said of it."""

import math

import pytest

from depth_anything.ingest.declaration import load_declaration

LEAST = "images: rgb\ndepth: depth\n"


def declared(tmp_path, text):
    path = tmp_path / "set.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_declaration(path)


def test_the_least_and_the_most_that_can_be_said(tmp_path):
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
def test_units(tmp_path, text, scale):
    assert declared(tmp_path, LEAST + text).scale == scale


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("image: rgb\ndepth: d\nunit: m", '"image" is no key; did you mean images'),
        (LEAST + "units: m", '"units" is no key; did you mean unit'),
        (LEAST + "unit: m\nsky_form: 3", "did you mean sky_from"),
        (LEAST + "unit: m\nlicense: MIT", "did you mean licence"),
        (LEAST + "unit: m\nqqq: 1", r'"qqq" is no key\. Known: name, images'),
        (LEAST + "unit: m\n1: 1", '"1" is no key'),
        (LEAST + "unit: m\n[1, 2]: 1", "no yaml"),
        (LEAST, "unit is missing: write  unit: m, cm or mm"),
        (LEAST + "unit:", "unit is missing"),
        (LEAST + "unit: feet", "unit: feet is unknown"),
        (LEAST + "unit: [m]", "is unknown"),
        (LEAST + "unit: true", "is unknown"),
        (LEAST + "scale: 0", "must be above 0"),
        (LEAST + "scale: -1", "must be above 0"),
        (LEAST + "scale: .nan", "must be above 0"),
        (LEAST + "scale: .inf", "must be above 0"),
        (LEAST + "scale: 1/0", "is unknown"),
        (LEAST + "unit: m\nscale: 1", "say the same"),
        (LEAST + "quantity: disparity\nunit: m", "disparity has no unit"),
        (LEAST + "quantity: inverse\nunit: m", "write depth or disparity"),
        (LEAST + "unit: m\ndistance: euclidean", "write planar or ray"),
        (LEAST + "unit: m\ndistance: ray", "needs  intrinsics"),
        (LEAST + "unit: m\nintrinsics: 525", "intrinsics are pixels"),
        (LEAST + "unit: m\nintrinsics: {fx: 1, fy: 1, cx: 1}", "intrinsics are pixels"),
        (LEAST + "unit: m\nintrinsics: [0, 1, 1, 1]", "fx and fy must be above 0"),
        (LEAST + "unit: m\ninvalid: far", "invalid: far is no number"),
        (LEAST + "unit: m\nsky: 5\nsky_from: 6", "give one of them"),
        (LEAST + "unit: m\nsky: 5\ninvalid: [0, 5]", "called invalid and sky"),
        (LEAST + "unit: m\nsky_from: 5\ninvalid: 6", "called invalid and sky"),
        (LEAST + "quantity: disparity\nsky_from: 5", "write  sky: 0"),
        (LEAST + "unit: m\nlicence: free for all", "no SPDX name"),
        (LEAST + "unit: m\nname: 2024-01-01", "name: .* is no text: put it in quotes"),
        (LEAST + "unit: m\nunit: mm", 'line 4: this is no yaml: "unit" comes twice'),
        ("depth: d\nunit: m", "images is missing"),
        ("images: d\nunit: m", "depth is missing"),
        ("images: [a, b]\ndepth: d\nunit: m", "images: .* is no text"),
        ("images: {stem}.jpg\ndepth: d", "no yaml"),
        ("rgb", "a set is declared by lines"),
        ("", "a set is declared by lines"),
        ("- a\n- b", "a set is declared by lines"),
        ("images: [", "no yaml"),
        ("a: !!python/object/apply:os.system [ls]", "no yaml: could not determine a constructor"),
        (b"\xff\xfe\x00a", "no yaml"),
        ("unit: " + "1" * 5000, "no yaml"),
        ("a: " * 200_000, "no yaml|larger"),
        ("[" * 5000, "no yaml"),
        ("#" * (1 << 20) + "#", "larger than 1 MiB"),
    ],
)
def test_a_wrong_yaml_is_one_sentence(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        declared(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "set.yaml")) and "\n" not in str(caught.value)


def test_a_yaml_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="No such file or directory: name the yaml"):
        load_declaration(tmp_path / "set.yaml")
    with pytest.raises(ValueError, match="not a regular file"):
        load_declaration(tmp_path)
