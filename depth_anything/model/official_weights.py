"""The official weights: file names, download locations and licenses."""

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from depth_anything.errors import Argument, UserError, error_reason

if TYPE_CHECKING:
    from depth_anything.model.metadata import ModelFacts

_SIZES = {"vits": "Small", "vitb": "Base", "vitl": "Large"}
_METRIC_SETS = {"hypersim": "Hypersim", "vkitti": "VKITTI"}
_MAX_DEPTH_M = {"hypersim": 20.0, "vkitti": 80.0}
# Only V1's names end in 14. Metric models name their training set. Browsers add (1) to a second download.
_OFFICIAL_NAME = re.compile(
    r"depth_anything_(v2_)?(?:metric_(hypersim|vkitti)_)?(vit[sblg])(14)?(?: ?\(\d+\))?"
)
_DINOV2_NAME = re.compile(r"dinov2_vit[sblg]14(?:_reg4)?_pretrain(?: ?\(\d+\))?")
_PERMISSIVE, _NON_COMMERCIAL = "Apache-2.0", "CC-BY-NC-4.0"


def find_official_weights(
    encoder: str,
    *,
    metric: str | None = None,
    version: int = 2,
    folder: str | Path = "checkpoints",
) -> Path:
    """Find official weights in a folder, else in the cache of the Hugging Face hub, else download them.

    Args:
        encoder: "vits", "vitb" or "vitl"; "vitg" only from the folder.
        metric: None for disparity; "hypersim" (indoors, up to 20 m) or "vkitti" (streets, up to 80 m) for depth.
        version: 2, or 1 for the weights of the first paper.
        folder: Where to look for a file of the official name.

    Returns:
        The file, under its official name.

    Raises:
        UserError: If there are no such weights, or they cannot be downloaded; the error names the file, its page and
            its license.
    """
    file = _file_name(encoder, metric, version)
    here = Path(folder) / file
    if here.is_file():
        return here
    if encoder not in _SIZES:
        raise UserError(
            f"there is no {here}, and official weights of {encoder} do not exist", "use vitl, or train one"
        )
    repository, kind, inside = _hub_location(encoder, metric, version)
    page, licence = official_page(file), official_license(file)
    try:
        return _download(repository, kind, inside, warning=_license_warning(file, page))
    except Exception as error:  # HTTP, cache and disk raise many types
        raise UserError(
            f"there is no {here}, and it cannot be downloaded ({error_reason(error)})",
            f"get {file} (license {licence}) from {page} and put it there",
        ) from error


def official_license(name: str | Path) -> str | None:
    """Return the license of an official file by its name; None for other names.

    DINOv2, V1 and the small V2 models have Apache-2.0, the other V2 models CC-BY-NC-4.0. The hub says Apache-2.0 for
    all metric models, but they were fine-tuned from V2 models, so the license of these is returned.
    """
    if _DINOV2_NAME.fullmatch(Path(name).stem.lower()):
        return _PERMISSIVE
    match = _OFFICIAL_NAME.fullmatch(Path(name).stem.lower())
    if match is None or not (match[1] or (match[4] and not match[2])):
        return None
    return _NON_COMMERCIAL if match[1] and match[3] != "vits" else _PERMISSIVE


def official_page(name: str | Path) -> str | None:
    """Return the web page of an official file by its name; None for other and unpublished names."""
    match = _OFFICIAL_NAME.fullmatch(Path(name).stem.lower())
    if match is None or official_license(name) is None or match[3] not in _SIZES:
        return None
    repository, kind, _ = _hub_location(match[3], match[2], 2 if match[1] else 1)
    return f"https://huggingface.co/{'spaces/' if kind == 'space' else ''}{repository}"


def official_repository(name: str | Path) -> str | None:
    """Return the hub repository with the weights of an official file; None for other names and if there is none."""
    match = _OFFICIAL_NAME.fullmatch(Path(name).stem.lower())
    if official_license(name) is None or match is None or match[3] not in _SIZES:
        return None
    if not match[1]:  # the .pth files are in a space, copies of their weights in these models
        return f"LiheYoung/depth_anything_{match[3]}14"
    return _hub_location(match[3], match[2], 2)[0]


def name_hints(name: str | Path) -> "ModelFacts":
    """Return what an official file name says: version, max_depth (meters, None for disparity) and license."""
    match = _OFFICIAL_NAME.fullmatch(Path(name).stem.lower())
    licence = official_license(name)
    if match is None or licence is None:
        return {}
    if match[1]:
        return {"version": 2, "max_depth": _MAX_DEPTH_M.get(match[2]), "licence": licence}
    return {"version": 1, "max_depth": None, "licence": licence}


def _file_name(encoder: str, metric: str | None, version: int) -> str:
    if encoder not in (*_SIZES, "vitg"):
        raise UserError(
            ["there are no published weights of ", Argument("encoder", encoder)],
            f"use one of {', '.join(_SIZES)}",
        )
    if metric not in (None, *_METRIC_SETS):
        raise UserError(
            [Argument("metric", metric), " is unknown"],
            f"use one of {', '.join(_METRIC_SETS)}, or None for disparity",
        )
    if version == 1:
        if metric or encoder == "vitg":
            raise UserError(
                f"version 1 has no {metric or encoder} weights of this network",
                ["use ", Argument("version", 2)],
            )
        return f"depth_anything_{encoder}14.pth"
    if version != 2:
        raise UserError([Argument("version", version), " must be 1 or 2"])
    return f"depth_anything_v2_{f'metric_{metric}_' if metric else ''}{encoder}.pth"


def _hub_location(encoder: str, metric: str | None, version: int) -> tuple[str, str, str]:
    """Return the repository of a file, the kind of the repository, and the path of the file in it."""
    file = _file_name(encoder, metric, version)
    if version == 1:
        return "LiheYoung/Depth-Anything", "space", f"checkpoints/{file}"
    trained_on = f"Metric-{_METRIC_SETS[metric]}-" if metric else ""
    return f"depth-anything/Depth-Anything-V2-{trained_on}{_SIZES[encoder]}", "model", file


def _license_warning(file: str, page: str) -> str | None:
    if official_license(file) != _NON_COMMERCIAL:
        return None
    return f"{file} from {page} has the license {_NON_COMMERCIAL}: no commercial use"


def _download(repository: str, kind: str, file: str, *, warning: str | None) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, file, repo_type=kind)
    if isinstance(cached, str):
        return Path(cached)
    # One request first: without a network, hf_hub_download retries for half a minute.
    get_hf_file_metadata(hf_hub_url(repository, file, repo_type=kind))
    if warning:
        warnings.warn(warning, stacklevel=3)
    return Path(hf_hub_download(repository, file, repo_type=kind))
