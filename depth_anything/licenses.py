"""Licenses of weights and data: SPDX names, their combination, and their fields in model cards."""

import re
from collections.abc import Iterable

from depth_anything.errors import UserError

UNKNOWN = "unknown"

_SPDX_EXPRESSION = re.compile(r"[A-Za-z0-9.+-]+(?: (?:AND|OR|WITH) [A-Za-z0-9.+-]+)*")
# SPDX's prefix is LicenseRef-; older manifests have the British spelling.
_LICENSE_REF = re.compile(r"(?<![\w-])Licen[cs]eRef-", re.IGNORECASE)
# Licenses with an id on the Hugging Face hub: id (SPDX name in lower case) → SPDX name.
_HUB_LICENSES = {
    name.lower(): name
    for name in (
        "Apache-2.0",
        "MIT",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "CC0-1.0",
        "CC-BY-2.0",
        "CC-BY-3.0",
        "CC-BY-4.0",
        "CC-BY-SA-3.0",
        "CC-BY-SA-4.0",
        "CC-BY-NC-2.0",
        "CC-BY-NC-3.0",
        "CC-BY-NC-4.0",
        "CC-BY-NC-SA-2.0",
        "CC-BY-NC-SA-3.0",
        "CC-BY-NC-SA-4.0",
        "CC-BY-NC-ND-3.0",
        "CC-BY-NC-ND-4.0",
        "CC-BY-ND-4.0",
        "AGPL-3.0",
        "GPL-3.0",
        "MPL-2.0",
        "ODbL-1.0",
        "Unlicense",
        "CreativeML-OpenRAIL-M",  # of Stable Diffusion 1; SPDX has no name for it
    )
}


def combine_licenses(licenses: Iterable[str | None]) -> str | None:
    """Combine the licenses of all weights and data that a model was made from, which all hold.

    Args:
        licenses: SPDX names or results of this function; None for unknown.

    Returns:
        For example "Apache-2.0 AND CC-BY-NC-4.0", sorted, with "unknown" at the end if one is; None if none is known.

    >>> combine_licenses(["CC-BY-NC-4.0", "Apache-2.0", "CC-BY-NC-4.0"])
    'Apache-2.0 AND CC-BY-NC-4.0'
    >>> combine_licenses(["MIT", None])
    'MIT AND unknown'
    >>> combine_licenses(["LicenceRef-ScanNet", "LicenseRef-ScanNet"])
    'LicenseRef-ScanNet'
    """
    found = {part for license in licenses for part in spdx_name(license or UNKNOWN).split(" AND ")}
    known = sorted(found - {UNKNOWN})
    return " AND ".join([*known, *sorted(found & {UNKNOWN})]) if known else None


def check_license(text: str) -> str:
    """Check that a text can be an SPDX expression, and return it with LicenceRef- spelled as LicenseRef-.

    Raises:
        UserError: If it cannot.
    """
    if not _SPDX_EXPRESSION.fullmatch(text):
        raise UserError(
            f"licence {text!r} is not an SPDX name such as CC-BY-4.0 or Apache-2.0",
            "type LicenseRef-NAME for another",
        )
    return _LICENSE_REF.sub("LicenseRef-", text)


def card_license_fields(license: str | None) -> dict[str, str]:
    """Return the license fields of a model card's front matter.

    >>> card_license_fields("CC-BY-NC-4.0")
    {'license': 'cc-by-nc-4.0'}
    """
    if license is None:
        return {"license": UNKNOWN}
    license = spdx_name(license)
    if license.lower() in _HUB_LICENSES:
        return {"license": license.lower()}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", license.lower())}


def license_from_card(text: str) -> str | None:
    """Read the license from a model card's front matter; None if it has none or an unnamed one.

    >>> license_from_card("---\\nlicense: apache-2.0\\n---\\n# A model")
    'Apache-2.0'
    """
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"(?m)^license:\s*[\"']?([\w.+-]+)", front[1]) if front else None
    if found is None or found[1] == UNKNOWN:
        return None
    if found[1] == "other":
        name = re.search(r"(?m)^license_name:\s*[\"']?([\w.+-]+)", front[1]) if front else None
        return f"LicenseRef-{name[1]}" if name else None
    return spdx_name(found[1])


def spdx_name(name: str) -> str:
    """Convert a hub id to its SPDX name, and LicenceRef- to LicenseRef-; other text is unchanged.

    >>> spdx_name("mit"), spdx_name("LicenceRef-ScanNet AND MIT")
    ('MIT', 'LicenseRef-ScanNet AND MIT')
    """
    return _HUB_LICENSES.get(name.lower(), _LICENSE_REF.sub("LicenseRef-", name))
