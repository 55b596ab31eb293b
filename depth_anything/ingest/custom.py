"""A user's own images with depth or disparity, as a YAML file declares them (declaration.py, docs/own-data.md).

An image and a map form a pair if the text in place of {stem} in their paths is the same. Nothing is guessed from
pixels. Zero, negative, infinite and NaN values are invalid in every set. `invalid` names further invalid values, `sky`
or `sky_from` those of the sky, as they are stored in the files.
"""

import io
import warnings
from collections.abc import Generator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from depth_anything.data.image_headers import DecodeCost, check_decode_cost, open_image
from depth_anything.ingest.file_pairs import PairedFiles
from depth_anything.ingest.maps import MAP_SUFFIXES, read_bytes, read_map
from depth_anything.ingest.source import DatasetInfo, RawSample, is_disk_failure, same_aspect_ratio

INTRINSIC_KEYS = ("fx", "fy", "cx", "cy")
_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class CustomSet:
    """A set as its YAML file declares it; a source for `write_source`.

    Attributes:
        folder: Folder of the YAML file, to which paths are relative.
        images: Folder of the images, or a pattern such as rgb/{stem}.jpg.
        depth: Folder or pattern of the maps.
        name: Name of the set. None: the name of the output folder.
        quantity: "depth" or "disparity".
        scale: Meters per stored unit. For disparity any factor, because only ratios matter.
        invalid: Stored values that mean "unknown".
        sky: Stored value that means sky.
        sky_from: Stored values from this one on mean sky.
        intrinsics: fx, fy, cx, cy of all images in pixels; the center of the upper left pixel is (0, 0).
        distance: "planar" (along the axis of the camera) or "ray" (from the center of the camera).
        key: Dataset in HDF5 files.
        channel: Channel in EXR files.
        licence: SPDX identifier.
        leave_out: A folder to skip: the folder that is being written.
    """

    folder: Path
    images: str
    depth: str
    name: str | None = None
    quantity: str = "depth"
    scale: float = 1.0
    invalid: tuple[float, ...] = ()
    sky: float | None = None
    sky_from: float | None = None
    intrinsics: tuple[float, ...] | None = None
    distance: str = "planar"
    key: str | None = None
    channel: str | None = None
    licence: str | None = None
    leave_out: Path | None = None

    @property
    def INFO(self) -> DatasetInfo:  # noqa: N802  a constant of the module in other sources
        """Facts for the writer."""
        return DatasetInfo(
            name="custom",
            title="a user's own set",
            records=0,
            layout=f"images {self.images}, {self.quantity} {self.depth}",
            get="from its owner",
            licence=self.licence or "",
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the pixels."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for key in ("folder", "name", "licence", "leave_out"):
            del values[key]
        return {key: value for key, value in values.items() if value is not None and value != ()}

    @property
    def files(self) -> PairedFiles:
        """The patterns of the images and the maps."""
        return PairedFiles(
            self.folder,
            self.images,
            self.depth,
            key="depth",
            suffixes=MAP_SUFFIXES,
            noun="map",
            example="images: rgb/img_{stem}.jpg  and  depth: depth/depth_{stem}.png",
            leave_out=self.leave_out,
        )

    def find(self, raw: Path) -> Generator[str, None, dict[str, int]]:
        """Yield a line per name with its image and its map; as `PairedFiles.lines`."""
        return self.files.lines()

    def read(self, raw: Path, line: str) -> RawSample:
        """Read the image and the map of a line.

        Raises:
            ValueError: One of them is missing, cannot be read, or has another aspect ratio.
        """
        data, stored = self.files.read(
            line, lambda path: read_map(path, key=self.key, channel=self.channel), content=self.quantity
        )
        size = read_image_size(data)
        check_aspect_ratio(size, stored.shape)
        return self._to_sample(data, size, stored)

    def _to_sample(self, data: bytes, size: tuple[int, int], stored: np.ndarray) -> RawSample:
        sky, unknown = None, np.zeros(stored.shape, bool)
        with np.errstate(over="ignore"):  # compared in the file's type, in which 655.35 is another number
            if self.sky is not None:
                sky = stored == self.sky
            elif self.sky_from is not None:
                sky = stored >= self.sky_from
            for value in self.invalid:
                unknown |= stored == value
        invalid = {"declared invalid": unknown} if self.invalid else {}
        values = stored.astype(np.float64) * self.scale
        meta: dict[str, Any] = {}
        if self.intrinsics is not None:
            meta["intrinsics"] = dict(zip(INTRINSIC_KEYS, self.intrinsics, strict=True))
        if self.quantity == "disparity":
            return RawSample(data, meta, disparity=values, sky=sky, invalid=invalid)
        meta["unit"] = "m"
        if self.distance == "ray":
            values *= self._depth_per_distance(size, stored.shape)
        return RawSample(data, meta, depth=values, sky=sky, invalid=invalid)

    def _depth_per_distance(self, size: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
        """Return planar depth divided by distance for each pixel of a map, float64 (H, W); `size` is the image's."""
        assert self.intrinsics is not None
        fx, fy, cx, cy = self.intrinsics
        if not (0 <= cx < size[1] and 0 <= cy < size[0]):
            raise ValueError(
                f"the principal point {cx:g}, {cy:g} is outside of the {size[1]} x {size[0]} pixels of the image"
            )
        x = ((np.arange(shape[1]) + 0.5) * size[1] / shape[1] - 0.5 - cx) / fx
        y = ((np.arange(shape[0]) + 0.5) * size[0] / shape[0] - 0.5 - cy) / fy
        return 1 / np.sqrt(1 + x**2 + y[:, None] ** 2)


def read_image_size(source: bytes | Path) -> tuple[int, int]:
    """Return the height and width of an image from its header, after its EXIF rotation.

    Raises:
        ValueError: The header cannot be read, or the image is too large.
        OSError: The disk fails.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the decoder reports damage and large sizes
        try:
            try:
                opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            except Image.DecompressionBombError:  # the limit of Pillow is lower than that of `open_image`
                opened = open_image(source if isinstance(source, bytes) else read_bytes(source))
            with opened as picture:
                width, height = picture.size
                rotated = picture.getexif().get(_ORIENTATION_TAG, 1) in (5, 6, 7, 8)
                check_decode_cost(DecodeCost("", width, height, 1, 0))
        except Exception as error:  # Pillow raises a dozen types for damaged files
            if is_disk_failure(error):
                raise
            reason = "of no known kind" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(f"its image cannot be decoded: {reason}") from error
    return (width, height) if rotated else (height, width)


def check_aspect_ratio(size: tuple[int, int], shape: tuple[int, ...]) -> None:
    """Raise ValueError if a map does not have the aspect ratio of its image; their sizes may differ."""
    if not same_aspect_ratio(size, shape):
        rotated = same_aspect_ratio(size[::-1], shape)
        raise ValueError(
            f"its map has {shape[1]} x {shape[0]} pixels, its image {size[1]} x {size[0]}: the aspect ratios differ"
            + ("; rotate one of them (see the EXIF tag Orientation)" if rotated else "")
        )
