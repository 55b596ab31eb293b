"""A Python function as teacher: `teacher=module:function`, from a photograph to a map.

The function takes a photograph, uint8 (H,W,3) RGB, and returns a map, a float array or tensor (h,w) of the photograph's
aspect ratio. Attributes of the function say what the map is: `quantity` ("depth" or "disparity"), `unit` ("m", "1/m"
or "relative"), and if wanted `licence` and `files`, the weights that it reads, which become part of the fingerprint.
It may also return (map, quantity, unit). An object with `__call__` and these attributes is as good.
"""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from depth_anything.errors import UserError, error_reason
from depth_anything.evaluation.predictions import check_aspect
from depth_anything.teachers.fingerprints import hash_files
from depth_anything.teachers.teacher import (
    LabelMaps,
    MapKind,
    Photographs,
    Teacher,
    TeacherFacts,
    agreed_license,
    failure_reason,
    resize_map,
)

PROBE_SIZE = (224, 288)
"""Height and width of the picture that is given to a function whose attributes do not say what it returns."""


class CallableTeacher(Teacher):
    """A function that predicts the map of one photograph."""

    input_text = "photographs as they are"

    def __init__(
        self,
        spec: str,
        *,
        multiple: int,
        quantity: str | None = None,
        unit: str | None = None,
        licence: str | None = None,
    ) -> None:
        """Import the function.

        Args:
            spec: "module:function"; the function's name may have dots.
            multiple: The sides of labels are multiples of it, pixels.
            quantity: What the map is, if the function does not say it.
            unit: Its unit, if the function does not say it.
            licence: License of the maps, if the function does not say it.

        Raises:
            UserError: If there is no such function, or the quantity is unknown or contradictory.
        """
        super().__init__()
        self.spec, self.multiple = spec, multiple
        self.function = import_function(spec)
        says = {name: getattr(self.function, name, None) for name in ("quantity", "unit", "licence")}
        returned: tuple[str | None, str | None] = (None, None)
        if says["quantity"] is None and quantity is None:
            returned = self._probe()
        self.kind = MapKind(*_agreed_kind(spec, says, returned, quantity, unit))
        self.facts = TeacherFacts(
            fingerprint=_fingerprint(spec, self.function),
            file=spec,
            licence=agreed_license(spec, says["licence"], licence),
            quantity=self.kind.quantity,
            unit=self.kind.unit,
            conversion=self.kind.conversion,
        )

    def predict(self, photographs: Photographs) -> LabelMaps:
        """Call the function for each photograph; a ValueError of it, or a wrong shape, is the reason for no label.

        Raises:
            UserError: If the function raises another error, which may be a fault of the machine and not of the
                photograph, or returns another quantity or unit than before.
        """
        height, width = photographs.size
        maps = torch.full((len(photographs.keys), height, width), torch.nan)
        failed: dict[int, str] = {}
        for position, frame in enumerate(photographs.frames()):
            try:
                values = self._call(frame.image)
                check_aspect(values, frame)
                disparity = self.kind.to_disparity(torch.from_numpy(values)).numpy()
                maps[position] = torch.from_numpy(resize_map(disparity, photographs.size))
            except UserError:
                raise
            except ValueError as error:
                failed[position] = f"{self.spec}: {failure_reason(error)}"
            except Exception as error:
                raise UserError(
                    f"{self.spec} raised {type(error).__name__} for {frame.key!r}: {error_reason(error)}",
                    "raise a ValueError for a photograph that can have no map",
                ) from error
        return LabelMaps(maps, failed)

    def _call(self, pixels: np.ndarray) -> np.ndarray:
        """Return the map of a photograph, float32 (h,w)."""
        values, quantity, unit = _split(self.function(np.array(pixels)))
        if (quantity, unit) not in ((None, None), (self.kind.quantity, self.kind.unit)):
            raise UserError(
                f"{self.spec} returned {quantity} in {unit}, not {self.kind.quantity} in {self.kind.unit}"
            )
        return _to_array(values)

    def _probe(self) -> tuple[str | None, str | None]:
        """Return the quantity and unit that the function returns with a map."""
        height, width = PROBE_SIZE
        ramp = np.linspace(0, 255, width).astype(np.uint8)
        picture = np.repeat(np.tile(ramp, (height, 1))[..., None], 3, axis=2)
        try:
            return _split(self.function(picture))[1:]
        except Exception:  # it may need a real photograph; then its quantity stays unknown
            return None, None


def import_function(spec: str) -> Callable[[np.ndarray], Any]:
    """Import the function that "module:function" names; the folder that the command runs in is searched, too.

    Raises:
        UserError: If there is none, or it cannot be called.
    """
    module, _, name = spec.partition(":")
    if (here := str(Path.cwd())) not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"teacher={spec} cannot be imported ({error_reason(error)})",
            "put the folder of its file into PYTHONPATH, or type teacher=FILE for a model",
        ) from error
    if not callable(found) or inspect.isclass(found):
        raise UserError(f"teacher={spec} is no function but {type(found).__name__}", "name a function")
    return found


def _agreed_kind(
    spec: str,
    says: dict[str, Any],
    returned: tuple[str | None, str | None],
    quantity: str | None,
    unit: str | None,
) -> tuple[str, str]:
    """Return quantity and unit from the attributes, from what the function returned, or from the config."""
    known, known_unit = says["quantity"] or returned[0], says["unit"] or returned[1]
    for name, told, typed in (("quantity", known, quantity), ("unit", known_unit, unit)):
        if told is not None and typed not in (None, told):
            raise UserError(f"{spec} says that its {name} is {told}", f"leave teacher_{name}={typed} out")
    known, known_unit = known or quantity, known_unit or unit
    if known is None:
        name = spec.partition(":")[2]
        raise UserError(
            f"{spec} does not say whether it returns depth or disparity",
            f'set {name}.quantity = "depth" in its file, or type teacher_quantity=depth or =disparity',
        )
    if known_unit is None and known == "depth":
        raise UserError(
            f"{spec} returns depth in an unknown unit",
            f'set {spec.partition(":")[2]}.unit = "m" in its file, or type teacher_unit=m or teacher_unit=relative',
        )
    return str(known), str(known_unit or "relative")


def _fingerprint(spec: str, function: Any) -> str:
    """Hash the file of the function's module, the files that it names, and its name."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    source = getattr(sys.modules[spec.partition(":")[0]], "__file__", None)
    files = {Path(file) for file in (source, getattr(module, "__file__", None)) if file}
    weights = getattr(function, "files", ())
    for file in [weights] if isinstance(weights, str | Path) else weights:
        if not Path(file).is_file():
            raise UserError(f"{spec}.files names {file}, which is no file")
        files.add(Path(file))
    digest = hashlib.sha256(spec.encode())
    digest.update(hash_files((file.name, file) for file in sorted(files)).encode())
    return f"sha256:{digest.hexdigest()}"


def _split(returned: Any) -> tuple[Any, str | None, str | None]:
    """Return map, quantity and unit of what a function returned."""
    if isinstance(returned, tuple):
        if len(returned) != 3:
            raise ValueError(f"it returned {len(returned)} values, not a map or (map, quantity, unit)")
        return returned
    return returned, None, None


def _to_array(values: Any) -> np.ndarray:
    """Return a map as float32 (h,w); axes of length one are dropped.

    Raises:
        ValueError: If it is no map.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().float().numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"it returned {type(values).__name__} in place of a map")
    array = array.squeeze() if array.ndim > 2 else array
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"it returned an array of shape {array.shape}, not (height, width)")
    return np.ascontiguousarray(array, np.float32)
