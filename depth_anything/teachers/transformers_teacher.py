"""A depth model of transformers as teacher: `teacher=transformers:FOLDER` or `transformers:OWNER/NAME`.

Everything that `AutoModelForDepthEstimation` loads, with its own image processor, on photographs as they are, and its
own `post_process_depth_estimation`, at the size of the labels. Where the labels have the size of the photographs, the
maps are those of transformers' "depth-estimation" pipeline. Code of a repository is never executed.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depth_anything.errors import UserError, error_reason
from depth_anything.licenses import license_from_card
from depth_anything.teachers.fingerprints import hash_files
from depth_anything.teachers.open_teacher import is_hub_name
from depth_anything.teachers.teacher import (
    LabelMaps,
    MapKind,
    Photographs,
    Teacher,
    TeacherFacts,
    agreed_license,
)

_CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
_SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
_PICKLES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")
_PROBE_SIZE = (480, 640)  # of the picture that shows whether weights that a folder lacks are used


class TransformersTeacher(Teacher):
    """A transformers model for depth estimation with its image processor."""

    def __init__(
        self,
        name: str,
        *,
        spec: str,
        multiple: int,
        quantity: str | None = None,
        unit: str | None = None,
        licence: str | None = None,
    ) -> None:
        """Load model and processor; a model of the hub is downloaded once.

        Args:
            name: A folder, or OWNER/NAME or OWNER/NAME@REVISION of the hub.
            spec: The teacher as it was typed.
            multiple: The sides of labels are multiples of it, pixels.
            quantity: What the model predicts, if that is unknown here, or in place of what is known.
            unit: Its unit, if that is unknown here, or in place of what is known.
            licence: License of the weights, if no model card says it.

        Raises:
            UserError: If the model is missing, damaged, not for depth, needs code of its own, or its quantity is
                unknown.
        """
        super().__init__()
        transformers = import_transformers(spec)
        folder = find_folder(name, download=True)
        if folder is None:
            raise _missing_error(spec, name)
        self.spec, self.multiple = spec, multiple
        with _one_sentence(spec, transformers.__version__):
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        self.kind = _map_kind(spec, config, quantity, unit)
        files = _weight_files(folder, spec)
        self.processor = self._load_processor(transformers, folder)
        self.model, missing = _load_model(transformers, spec, folder, files)
        self._check_missing(missing)
        self.facts = TeacherFacts(
            fingerprint=hash_files(
                (file.name, file)
                for file in [*files, *(folder / name for name in _CONFIG_FILES)]
                if file.is_file()
            ),
            file=spec,
            licence=agreed_license(spec, _card_license(folder), licence),
            quantity=self.kind.quantity,
            unit=self.kind.unit,
            conversion=self.kind.conversion,
        )
        self.input_text = f"photographs as they are, {type(self.processor).__name__}, {{precision}}"

    @torch.no_grad()
    def predict(self, photographs: Photographs) -> LabelMaps:
        """Predict disparity with the model's own preparation and post-processing."""
        values = self._post_process(self._run(photographs.image), photographs)
        return LabelMaps(self.kind.to_disparity(values))

    def _run(self, image: Tensor) -> Any:
        """Prepare photographs (B,H,W,3) uint8 on the CPU, as transformers' pipeline does, and run the model."""
        channels_first = list(image.cpu().permute(0, 3, 1, 2).contiguous())
        inputs = self.processor(
            images=channels_first, return_tensors="pt", input_data_format="channels_first"
        )
        parameter = next(self.model.parameters())
        output = self.model(
            **{
                name: tensor.to(parameter.device, parameter.dtype)
                if tensor.is_floating_point()
                else tensor.to(parameter.device)
                for name, tensor in inputs.items()
            }
        )
        for name in ("predicted_depth", "field_of_view"):  # half precisions are not interpolated everywhere
            if getattr(output, name, None) is not None:
                setattr(output, name, getattr(output, name).float())
        return output

    def _post_process(self, output: Any, photographs: Photographs) -> Tensor:
        """Return the maps (B,h,w) at the size of the labels, in the model's quantity."""
        count, source = photographs.image.shape[0], tuple(photographs.image.shape[1:3])
        process = self.processor.post_process_depth_estimation
        sizes: dict[str, Any] = {"target_sizes": [photographs.size] * count}
        if (
            "source_sizes" in inspect.signature(process).parameters
        ):  # ZoeDepth removes the padding of the source
            sizes["source_sizes"] = [source] * count
            if source == photographs.size:
                del sizes["target_sizes"]
        return torch.stack(
            [one["predicted_depth"].reshape(photographs.size) for one in process(output, **sizes)]
        )

    def _load_processor(self, transformers: Any, folder: Path) -> Any:
        with _one_sentence(self.spec, transformers.__version__):
            processor = transformers.AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        if not hasattr(processor, "post_process_depth_estimation"):
            raise UserError(
                f"teacher={self.spec}: {type(processor).__name__} has no post-processing of depth maps",
                "write a function and type teacher=module:function",
            )
        return processor

    def _check_missing(self, missing: Sequence[str]) -> None:
        """Check that weights which the folder lacks are not used, as some of Intel/dpt-large (transformers #28292).

        They become NaN, which would show in a map.

        Raises:
            UserError: If they are used.
        """
        if not missing:
            return
        parameters = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        with torch.no_grad():
            for name in missing:
                if name in parameters and parameters[name].is_floating_point():
                    parameters[name].fill_(torch.nan)
        pixels = torch.randint(0, 256, (1, *_PROBE_SIZE, 3), generator=torch.Generator().manual_seed(0))
        probe = Photographs(pixels.to(torch.uint8), _PROBE_SIZE, ["probe"], [{}])
        if not self.predict(probe).disparity.isfinite().all():
            raise UserError(
                f"teacher={self.spec} lacks weights: {', '.join(missing[:2])}"
                + (f" and {len(missing) - 2} others" if len(missing) > 2 else ""),
                "download the folder again",
            )


def import_transformers(spec: str) -> Any:
    """Import transformers.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"teacher={spec} needs transformers", "type pip install 'depth-anything-train[teachers]'"
        ) from error
    return transformers


def find_folder(name: str, *, download: bool) -> Path | None:
    """Return the folder of a model: a folder of that name, or the snapshot of a repository of the hub.

    Args:
        name: A folder, or OWNER/NAME or OWNER/NAME@REVISION.
        download: Ask the hub; else only this machine's cache is searched.

    Returns:
        The folder; None if there is none, or the hub cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_name(name):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, _, revision = name.partition("@")

    def fetch(*patterns: str) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=[*_CONFIG_FILES, "README.md", *patterns],
                local_files_only=not download,
            )
        )

    try:
        folder = fetch(*_SAFETENSORS)
        return folder if any(folder.glob("*.safetensors")) else fetch(*_PICKLES)
    except (OSError, ValueError, HfHubHTTPError, HFValidationError):
        return None


def _missing_error(spec: str, name: str) -> UserError:
    if not is_hub_name(name):
        return UserError(
            f"teacher={spec}: there is no folder {name}",
            "type transformers:FOLDER or transformers:OWNER/NAME",
        )
    return UserError(
        f"teacher={spec} is neither a folder nor in this machine's cache, and the Hugging Face hub does not give it",
        f"check the name, or type  hf download {name.partition('@')[0]} --local-dir FOLDER  where there is a network, "
        "and teacher=transformers:FOLDER here",
    )


@contextmanager
def _one_sentence(spec: str, version: str) -> Iterator[None]:
    """Turn the many errors of loading into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers raises many types, also bare KeyError
        reason = error_reason(error)
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            reason = "it needs code from its repository, which is never executed"
        raise UserError(
            f"teacher={spec} cannot be loaded by transformers {version}: {reason}",
            "type another teacher, or teacher=module:function for a model with code of its own",
        ) from error


def _weight_files(folder: Path, spec: str) -> list[Path]:
    """Return the weight files of a folder: safetensors, or files of tensors that torch can read without code."""
    for patterns in (_SAFETENSORS, _PICKLES):
        files = sorted(file for pattern in patterns for file in folder.glob(pattern))
        if any(file.suffix in (".safetensors", ".bin") for file in files):
            return files
    raise UserError(
        f"teacher={spec}: {folder} has no model.safetensors and no pytorch_model.bin",
        "type a folder or repository with weights of PyTorch",
    )


def _load_model(
    transformers: Any, spec: str, folder: Path, files: Sequence[Path]
) -> tuple[torch.nn.Module, list[str]]:
    """Load a model in float32, and list the weights that its files lack; pickles are read without executing code."""
    safe = any(file.suffix == ".safetensors" for file in files)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it reports missing weights, which are checked here
    try:
        with _one_sentence(spec, transformers.__version__):
            model, info = transformers.AutoModelForDepthEstimation.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=safe,
                weights_only=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    finally:
        transformers.logging.set_verbosity(verbosity)
    return model.eval().requires_grad_(False), sorted(info["missing_keys"])


def _card_license(folder: Path) -> str | None:
    card = folder / "README.md"
    return license_from_card(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None


def _map_kind(spec: str, config: Any, quantity: str | None, unit: str | None) -> MapKind:
    """Return what a model predicts, from its config or from the keys that were typed.

    Raises:
        UserError: If neither says it.
    """
    known = known_kind(config)
    if quantity is None and known is None:
        raise UserError(
            f"teacher={spec}: what a model of type {config.model_type} predicts is unknown",
            "type teacher_quantity=disparity (larger is nearer), or teacher_quantity=depth with teacher_unit=m or "
            "teacher_unit=relative",
        )
    if known is not None and quantity in (None, known.quantity):
        return MapKind(known.quantity, unit or known.unit, known.max_depth if unit in (None, "m") else None)
    if quantity == "depth" and unit is None:
        raise UserError(
            f"teacher={spec}: the unit of its depth is unknown",
            "type teacher_unit=m or teacher_unit=relative",
        )
    assert quantity is not None
    return MapKind(quantity, unit or "relative")


def known_kind(config: Any) -> MapKind | None:
    """Return what a transformers model predicts after `post_process_depth_estimation`; None if it is unknown.

    - depth_anything: `depth_estimation_type` "relative" ends in a ReLU, disparity as in the paper; "metric" ends in a
      sigmoid times `max_depth`, meters (transformers' DepthAnythingConfig and DepthAnythingDepthEstimationHead).
    - dpt: MiDaS's inverse depth up to scale and shift (DPT, arXiv 2103.13413, §4.1). With `add_projection`, which the
      conversion of DINOv2's depth heads sets, depth in meters (NYU, KITTI; DINOv2, arXiv 2304.07193, §7.4).
    - glpn: depth in meters, a sigmoid times `max_depth` (GLPN, arXiv 2201.07436; GLPNDepthEstimationHead).
    - zoedepth: depth in meters, at most the largest `max_depth` of `bin_configurations` (ZoeDepth, arXiv 2302.12288).
    - depth_pro: its processor returns depth, in meters if the model estimates the field of view (`use_fov_model`), and
      without it up to the focal length (Depth Pro, arXiv 2410.02073, §3.1; DepthProImageProcessor).
    - tipsv2_dpt: depth in meters between `min_depth` and `max_depth` (transformers' Tipsv2DptConfig).
    """
    model_type = str(config.model_type)
    if model_type == "depth_anything":
        if config.depth_estimation_type == "metric":
            return MapKind("depth", "m", _meters(config.max_depth))
        return MapKind("disparity", "relative")
    if model_type == "dpt":
        return MapKind("depth", "m") if config.add_projection else MapKind("disparity", "relative")
    if model_type in ("glpn", "tipsv2_dpt"):
        return MapKind("depth", "m", _meters(config.max_depth))
    if model_type == "zoedepth":
        ranges = [bins["max_depth"] for bins in config.bin_configurations if isinstance(bins, Mapping)]
        return MapKind("depth", "m", _meters(max(ranges, default=None)))
    if model_type == "depth_pro":
        return MapKind("depth", "m" if config.use_fov_model else "relative")
    return None


def _meters(value: Any) -> float | None:
    return float(value) if value else None
