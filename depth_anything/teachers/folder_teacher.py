"""A folder of maps as teacher: `teacher=folder:DIR`, with a map per photograph that any program made.

Maps are found by name, read and checked as `depth-anything evaluate --predictions` does.
"""

from pathlib import Path

import torch

from depth_anything.errors import UserError, format_parts
from depth_anything.evaluation.predictions import PrecomputedMaps, check_aspect
from depth_anything.teachers.fingerprints import hash_files
from depth_anything.teachers.teacher import (
    LabelMaps,
    MapKind,
    Photographs,
    Teacher,
    TeacherFacts,
    failure_reason,
    resize_map,
)


class FolderTeacher(Teacher):
    """Maps on disk, one per photograph."""

    input_text = "maps of a folder"

    def __init__(
        self,
        folder: str | Path,
        *,
        spec: str,
        multiple: int,
        quantity: str | None = None,
        unit: str | None = None,
        licence: str | None = None,
    ) -> None:
        """List and hash the folder.

        Args:
            folder: Searched recursively for .npy, .exr and 16-bit .png files.
            spec: The teacher as it was typed.
            multiple: The sides of labels are multiples of it, pixels.
            quantity: What the maps are, if the files do not say it.
            unit: Their unit; by default meters for depth, and relative for disparity.
            licence: License of the maps.

        Raises:
            UserError: If there is no map, or their quantity is unknown or contradictory.
        """
        super().__init__()
        try:
            self.maps = PrecomputedMaps(folder, quantity=quantity)
        except UserError as error:
            fix = format_parts(error.fix_parts, flags={"quantity": "teacher_quantity={}"})
            fix = fix or "type teacher=folder:DIR for a folder of .npy, .exr or 16-bit .png maps"
            raise UserError(f"teacher={spec}: {error.what}", fix) from error
        self.multiple = multiple
        self.kind = MapKind(
            self.maps.quantity, unit or ("m" if self.maps.quantity == "depth" else "relative")
        )
        root = self.maps.folder
        self.facts = TeacherFacts(
            fingerprint=hash_files((file.relative_to(root).as_posix(), file) for file in self.maps.files),
            file=spec,
            licence=licence,
            quantity=self.kind.quantity,
            unit=self.kind.unit,
            conversion=self.kind.conversion,
        )

    def predict(self, photographs: Photographs) -> LabelMaps:
        """Read the map of each photograph; why one has none is the reason for no label."""
        height, width = photographs.size
        maps = torch.full((len(photographs.keys), height, width), torch.nan)
        failed: dict[int, str] = {}
        for position, frame in enumerate(photographs.frames()):
            try:
                values = self.maps.load_map(frame)
                check_aspect(values, frame)
                disparity = self.kind.to_disparity(torch.from_numpy(values)).numpy()
                maps[position] = torch.from_numpy(resize_map(disparity, photographs.size))
            except ValueError as error:
                failed[position] = failure_reason(error)
        return LabelMaps(maps, failed)
