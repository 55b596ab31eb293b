"""Licences of weights and data by their SPDX names: put together, and as the hub's cards write them."""

import re
from collections.abc import Iterable

UNKNOWN = "unknown"

_SPDX_EXPRESSION = re.compile(r"[A-Za-z0-9.+-]+(?: (?:AND|OR|WITH) [A-Za-z0-9.+-]+)*")
# SPDX's prefix is LicenseRef-; the British spelling, which older manifests have, is no SPDX name.
_LICENSE_REF = re.compile(r"(?<![\w-])Licen[cs]eRef-", re.IGNORECASE)
# Those that the hub has an id for: the name in small letters.
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
    )
}


def combine_licenses(licences: Iterable[str | None]) -> str | None:
    """Join the licences of everything that a model was made from: whoever uses it keeps to all of them.

    Which of two is the stricter is a question for lawyers; that both hold is not.

    Args:
        licences: SPDX names or what this function made of some; None where one is not known.

    Returns:
        As "Apache-2.0 AND CC-BY-NC-4.0", sorted, with "unknown" at the end if one is; None if none is known.

    >>> combine(["CC-BY-NC-4.0", "Apache-2.0", "CC-BY-NC-4.0"])
    'Apache-2.0 AND CC-BY-NC-4.0'
    >>> combine(["MIT", None])
    'MIT AND unknown'
    >>> combine(["LicenceRef-ScanNet", "LicenseRef-ScanNet"])
    'LicenseRef-ScanNet'
    """
    found = {part for licence in licences for part in spdx_name(licence or UNKNOWN).split(" AND ")}
    known = sorted(found - {UNKNOWN})
    return " AND ".join([*known, *sorted(found & {UNKNOWN})]) if known else None


def check_license(text: str) -> str:
    """Return a licence that a user typed, if it can be an SPDX expression; LicenceRef- becomes SPDX's LicenseRef-.

    Raises:
        ValueError: If it cannot.
    """
    if not _SPDX_EXPRESSION.fullmatch(text):
        raise ValueError(
            f"licence {text!r} is no SPDX name such as CC-BY-4.0 or Apache-2.0; type LicenseRef-NAME for another"
        )
    return _LICENSE_REF.sub("LicenseRef-", text)


def card_license_fields(licence: str | None) -> dict[str, str]:
    """Write a licence as the front matter of a card on the hub has it.

    >>> hub_fields("CC-BY-NC-4.0")
    {'license': 'cc-by-nc-4.0'}
    """
    if licence is None:
        return {"license": UNKNOWN}
    licence = spdx_name(licence)
    if licence.lower() in _HUB_LICENSES:
        return {"license": licence.lower()}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", licence.lower())}


def license_from_card(text: str) -> str | None:
    """Read the licence out of a card's front matter; None where it says none that has a name.

    >>> licence_of_card("---\\nlicense: apache-2.0\\n---\\n# A model")
    'Apache-2.0'
    """
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"(?m)^license:\s*[\"']?([\w.+-]+)", front[1]) if front else None
    if found is None or found[1] == UNKNOWN:
        return None
    if found[1] == "other":
        named = re.search(r"(?m)^license_name:\s*[\"']?([\w.+-]+)", front[1]) if front else None
        return f"LicenseRef-{named[1]}" if named else None
    return spdx_name(found[1])


def spdx_name(name: str) -> str:
    """Give a licence's hub id its SPDX name, and LicenceRef- its SPDX spelling; any other text stays.

    >>> spdx_name("mit"), spdx_name("LicenceRef-ScanNet AND MIT")
    ('MIT', 'LicenseRef-ScanNet AND MIT')
    """
    return _HUB_LICENSES.get(name.lower(), _LICENSE_REF.sub("LicenseRef-", name))
