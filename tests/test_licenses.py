"""Licenses: combined, checked, and in model cards."""

import re

import pytest

from depth_anything.evaluation.benchmarks.benchmark_catalog import BENCHMARKS, load_benchmark
from depth_anything.ingest.catalog import SETS
from depth_anything.ingest.catalog import load_source as load_source
from depth_anything.licenses import (
    card_license_fields,
    check_license,
    combine_licenses,
    license_from_card,
    spdx_name,
)


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        ([], None),
        ([None, None], None),
        (["unknown"], None),
        (["MIT"], "MIT"),
        (["CC-BY-NC-4.0", "Apache-2.0", "CC-BY-NC-4.0"], "Apache-2.0 AND CC-BY-NC-4.0"),
        (["CC-BY-NC-4.0", None], "CC-BY-NC-4.0 AND unknown"),
        (["B AND unknown", "A AND C"], "A AND B AND C AND unknown"),
    ],
)
def test_licenses_are_combined(parts, whole):
    assert combine_licenses(parts) == whole
    assert combine_licenses([whole, *parts]) == whole  # once more changes nothing


@pytest.mark.parametrize("typed", ["CC-BY-4.0", "Apache-2.0 AND MIT", "LicenseRef-ours", "GPL-2.0+"])
def test_typed_licenses_are_checked(typed):
    assert check_license(typed) == typed


@pytest.mark.parametrize("typed", ["", "my own", "all rights reserved", "MIT,Apache-2.0", "<b>"])
def test_other_texts_are_refused(typed):
    with pytest.raises(ValueError, match="LicenseRef-NAME"):
        check_license(typed)


@pytest.mark.parametrize(
    ("licence", "fields"),
    [
        (None, {"license": "unknown"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        (
            "Apache-2.0 AND CC-BY-NC-4.0",
            {"license": "other", "license_name": "apache-2.0-and-cc-by-nc-4.0"},
        ),
    ],
)
def test_card_license_fields(licence, fields):
    assert card_license_fields(licence) == fields


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags:\n- x\n---\n# Name", "Apache-2.0"),
        ("---\r\ntags:\r\n- depth\r\nlicense: 'cc-by-nc-4.0'\r\n---\r\n", "CC-BY-NC-4.0"),
        ("---\nlicense: other\nlicense_name: dinov3-license\n---", "LicenseRef-dinov3-license"),
        ("---\nlicense: other\n---", None),
        ("---\nlicense: unknown\n---", None),
        ("---\nlicense: openrail\n---", "openrail"),
        ("---\ntags: []\n---\nlicense: mit", None),
        ("license: mit", None),
        ("", None),
    ],
)
def test_license_is_read_from_cards(text, licence):
    assert license_from_card(text) == licence


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_states_an_spdx_expression(name):
    licence = load_benchmark(name).licence
    assert check_license(licence) == licence == spdx_name(licence)
    assert re.fullmatch(r"(LicenseRef-|CC-BY-|MIT|Apache-)[A-Za-z0-9.-]*", licence)


@pytest.mark.parametrize("name", SETS)
def test_every_set_states_an_spdx_expression(name):
    licence = load_source(name).INFO.licence
    assert check_license(licence) == licence == spdx_name(licence)


@pytest.mark.parametrize("old", ["LicenceRef-ScanNet", "licenceref-ScanNet", "Licenseref-ScanNet"])
def test_the_british_spelling_is_converted(old):
    assert spdx_name(old) == "LicenseRef-ScanNet"
    assert combine_licenses([old, "LicenseRef-ScanNet"]) == "LicenseRef-ScanNet"
    assert combine_licenses([f"MIT AND {old}", None]) == "LicenseRef-ScanNet AND MIT AND unknown"
    assert check_license(f"{old} OR MIT") == "LicenseRef-ScanNet OR MIT"
    assert card_license_fields(old) == {"license": "other", "license_name": "licenseref-scannet"}
    assert spdx_name("MyLicenceRef-x") == "MyLicenceRef-x"  # another name, which only ends like it
