"""Label sets: for each image shard a shard of pseudo-labels with the same keys, and NAME.json, which marks it as done.

Labels are disparity, larger is nearer, for every kind of teacher; NAME.json records the conversion.

NAME.json is written last. It records what the shard contains, which teacher made it and how, which image shard it
labels, and which images have no label and why: number of images = labels + skipped. The manifest is written when every
shard is done. It records the teacher and, for each label shard, the hash of its image shard, so that labels are never
joined with other images.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from depth_anything import __version__
from depth_anything.data import codec as map_codec
from depth_anything.data.address import is_remote
from depth_anything.data.reader import ShardReader
from depth_anything.data.shards import build_set, open_set, write_manifest
from depth_anything.data.tars import ShardError, ShardInfo, ShardSet, write_shard
from depth_anything.disk import atomic_write
from depth_anything.errors import PSEUDOLABEL_COMMAND
from depth_anything.licenses import combine_licenses

_LABEL_AGAIN = ("remove it and type ", PSEUDOLABEL_COMMAND)
_OTHER_FOLDER = ("type ", PSEUDOLABEL_COMMAND, " labels=FOLDER with another folder, or remove this one")


@dataclass(frozen=True)
class LabelSettings:
    """How labels were made; equal for all shards of a set.

    Attributes:
        teacher: "fingerprint" of the weights, and if known "file", "licence", and how the output became disparity:
            "quantity", "unit", "conversion". Older label sets have no such entries: the output was stored unchanged.
        preprocessing: Preprocessing of the images.
        codec: "q12" or "f32".
    """

    teacher: Mapping[str, Any]
    preprocessing: str
    codec: str

    @property
    def conversion(self) -> tuple[Any, ...]:
        """What the teacher predicts, its unit, and how that became disparity."""
        get = self.teacher.get
        return get("quantity", "disparity"), get("unit", "relative"), get("conversion")

    @property
    def teacher_name(self) -> str:
        """The teacher's file, if known, and fingerprint."""
        fingerprint = str(self.teacher["fingerprint"])[:19]
        return f"{self.teacher['file']} ({fingerprint})" if "file" in self.teacher else fingerprint


@dataclass(frozen=True)
class LabeledShard:
    """The image shard that a label shard labels."""

    set: str
    records: int
    hash: str


@dataclass(frozen=True)
class LabelSidecar(LabelSettings):
    """The content of NAME.json; its fields are the keys of the file.

    Attributes:
        name: Name of the shard.
        records: Number of labels.
        bytes: Size of the tar; 0 without labels.
        hash: "sha256:…" of the tar; "" without labels.
        image: The image shard.
        skipped: Key to reason, for each image without a label.
        values: Smallest and largest value of all labels.
        version: Version of this program.
    """

    name: str
    records: int
    bytes: int
    hash: str
    image: LabeledShard
    skipped: Mapping[str, str]
    values: Sequence[float] = (0.0, 0.0)
    version: str = __version__


def write_label_sidecar(
    root: str | Path,
    info: ShardInfo,
    *,
    image_set: str,
    image: ShardInfo,
    teacher: Mapping[str, Any],
    preprocessing: str,
    codec: str,
    values: tuple[float, float],
    skipped: Mapping[str, str],
) -> None:
    """Write NAME.json next to a label shard, which marks it as done.

    Args:
        root: Folder of the label set.
        info: The label shard, from `write_shard`; records 0 and hash "" if no image has a label.
        image_set: Name of the set of images.
        image: The image shard.
        teacher, preprocessing, codec: As in `LabelSettings`.
        values, skipped: As in `LabelSidecar`.

    Raises:
        ShardError: The number of images is not labels + skipped.
    """
    if image.records != info.records + len(skipped):
        raise ShardError(
            f"{root}/{image.name}: {image.records} images, but {info.records} labels and {len(skipped)} skipped"
        )
    sidecar = LabelSidecar(
        name=image.name,
        records=info.records,
        bytes=info.bytes,
        hash=info.hash,
        image=LabeledShard(image_set, image.records, image.hash),
        teacher=dict(teacher),
        preprocessing=preprocessing,
        codec=codec,
        values=list(values),
        skipped=dict(skipped),
    )
    text = json.dumps(asdict(sidecar), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(_sidecar_path(root, image.name), text.encode())


def read_label_sidecar(root: str | Path, shard: str) -> LabelSidecar | None:
    """Read NAME.json of a label shard; None if the shard is not done.

    Raises:
        ShardError: It is damaged, belongs to another shard, or does not match the tar next to it.
    """
    path = _sidecar_path(root, shard)
    try:
        content = json.loads(path.read_bytes())
        image = LabeledShard(*(content["image"][key] for key in ("set", "records", "hash")))
        known = {key: content[key] for key in LabelSidecar.__dataclass_fields__ if key in content}
        sidecar = LabelSidecar(**{**known, "image": image})
        sidecar.skipped.items()
        sidecar.teacher["fingerprint"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{path} is damaged", _LABEL_AGAIN) from error
    if sidecar.name != shard:
        raise ShardError(
            f"{path} belongs to shard {sidecar.name}", ["restore the file names, or ", *_LABEL_AGAIN]
        )
    if sidecar.records and _tar_size_and_hash(path) != (sidecar.bytes, sidecar.hash):
        raise ShardError(f"{path} does not match the tar next to it", _LABEL_AGAIN)
    return sidecar


def finish_labels(root: str | Path, images: ShardSet) -> ShardSet | None:
    """Write the manifest of a label set if every shard of the images is done.

    Any number of processes may call it. Shards without any label are left out of the manifest.

    Returns:
        The set, or None if a shard is not done, or its NAME.json is damaged or belongs to another tar.

    Raises:
        ShardError: Shards have different teachers or label other images, or no image has a label.
    """
    if Path(root, "manifest.json").is_file():
        labels = _open_finished_labels(root, images, check=False)
        if len(_image_hashes(labels)) == len(images.shards):
            _check_image_hashes(root, images, _image_hashes(labels))
            return labels
    try:
        done = _read_done_sidecars(root, images)
    except ShardError:
        return None
    if len(done) < len(images.shards):
        return None
    rows, meta = _manifest_rows_and_meta(root, images, done)
    if not rows:
        raise _no_labels_error(root, images, done)
    return write_manifest(root, name=images.name, shards=rows, meta=meta)


def open_labels(
    root: str | Path, images: ShardSet, *, allow_partial: bool = False, only: Sequence[str] | None = None
) -> ShardSet:
    """Open the labels of an image set.

    Args:
        root: Folder of the label set, or URL prefix of a finished one.
        images: The set that was labeled.
        allow_partial: Accept an unfinished set, with the shards that are done.
        only: With `allow_partial`, use exactly these shards.

    Raises:
        ShardError: The set is unfinished or damaged, shards are swapped, have different teachers or label other images.
    """
    root = str(root).rstrip("/")
    finished = is_remote(root) or Path(root, "manifest.json").is_file()
    if not finished and not os.path.isdir(root):
        raise ShardError(
            f"{root} is not a folder", [f"make labels of {images.name} with ", PSEUDOLABEL_COMMAND]
        )
    if finished and (is_remote(root) or not allow_partial):
        labels = _open_finished_labels(root, images, name=images.name)
        hashes = _image_hashes(labels)
    else:
        done = _read_done_sidecars(root, images)
        if not allow_partial:
            raise ShardError(
                f"{root} is not finished, {len(done)} of {len(images.shards)} shards are done",
                ["type ", PSEUDOLABEL_COMMAND, " to continue, or allow_partial=true to use these"],
            )
        done = {name: done[name] for name in _select_shards(root, done, only)}
        rows, meta = _manifest_rows_and_meta(root, images, done)
        labels = build_set(root, name=images.name, shards=rows, meta=meta)
        hashes = meta["images"]["hashes"]
        if not labels.records:
            raise ShardError(f"{root} has no labels yet", ["type ", PSEUDOLABEL_COMMAND])
    _check_image_hashes(root, images, {shard.name: hashes[shard.name] for shard in labels.shards})
    return labels


class LabelSetWriter:
    """Writes a label set, together with any number of other processes.

    Attributes:
        root: Folder of the label set.
        images: The set to label.
        codec: Codec of the labels.
    """

    def __init__(
        self,
        root: str | Path,
        images: ShardSet,
        *,
        teacher: Mapping[str, Any],
        preprocessing: str,
        codec: str,
    ) -> None:
        """Check that existing labels have the same settings.

        Args:
            root: Folder; created with the first shard.
            images: The set to label.
            teacher, preprocessing, codec: As in `LabelSettings`.

        Raises:
            ShardError: The folder has labels with other settings or of other images, or it is not a folder.
        """
        if is_remote(str(root)):
            raise ShardError(f"labels are written to a folder, and {root} is an address: type labels=FOLDER")
        self.root, self.images, self.codec = str(root), images, codec
        self._settings = LabelSettings(dict(teacher), preprocessing, codec)
        self._infos = {shard.name: shard for shard in images.shards}
        self._done: set[str] = set()
        self._reader = ShardReader()
        for name in self._infos:
            if self.done(name):  # one is enough: reading all would take minutes
                break

    def done(self, shard: str) -> bool:
        """Tell whether a shard has its labels.

        Raises:
            ShardError: It has labels with other settings or of other images.
        """
        if shard not in self._done:
            try:
                sidecar = read_label_sidecar(self.root, shard)
            except ShardError:
                return False  # damaged, or its writer died while replacing it: it is written again
            if sidecar is None:
                return False
            _check_same_settings(self.root, shard, sidecar, self._settings)
            if sidecar.image.hash != self._infos[shard].hash:
                raise _other_images_error(self.root, self.images, shard)
            self._done.add(shard)
        return True

    def count_unlabeled_images(self) -> int:
        """Return the number of images in shards that are not done."""
        return sum(shard.records for shard in self.images.shards if not self.done(shard.name))

    def publish(
        self,
        shard: str,
        labels: Mapping[int, bytes | Mapping[str, bytes]],
        failed: Sequence[tuple[int, str]],
    ) -> None:
        """Write a shard of labels and its NAME.json.

        Args:
            shard: Name of the image shard.
            labels: Record number in the image shard to encoded disparity, or to the files of the record,
                disparity.CODEC and others.
            failed: Record number and reason of each image without a label.

        Raises:
            ShardError: An image has both a label and a reason, or neither.
        """
        image = self._infos[shard]
        if sorted([*labels, *(index for index, _ in failed)]) != list(range(image.records)):
            raise ShardError(
                f"{self.root}/{shard}: each of the {image.records} images needs one label or one reason"
            )
        keys = self.keys(shard)
        Path(self.root).mkdir(parents=True, exist_ok=True)
        Path(self.root, "manifest.json").unlink(missing_ok=True)  # when a shard of a finished set is replaced
        path = Path(self.root, f"{shard}.tar")
        info = ShardInfo(shard, 0, 0, "")
        name = f"disparity.{self.codec}"
        records = {
            index: {name: label} if isinstance(label, bytes) else dict(label)
            for index, label in labels.items()
        }
        if records:
            info = write_shard(path, ((keys[i], records[i]) for i in sorted(records)))
        ranges = [map_codec.value_range(files[name]) for files in records.values()] or [(0.0, 0.0)]
        write_label_sidecar(
            self.root,
            info,
            image_set=self.images.name,
            image=image,
            teacher=self._settings.teacher,
            preprocessing=self._settings.preprocessing,
            codec=self.codec,
            values=(min(low for low, _ in ranges), max(high for _, high in ranges)),
            skipped={keys[index]: reason for index, reason in failed},
        )
        self._done.add(shard)

    def finish(self) -> bool:
        """Write the manifest if every shard is done; return whether that is so."""
        return all(map(self.done, self._infos)) and finish_labels(self.root, self.images) is not None

    def keys(self, shard: str) -> list[str]:
        """Return the keys of a shard's images; "record 0", "record 1", … if the shard cannot be read."""
        try:
            return self._reader.keys(self.images.url(shard))
        except ShardError:
            return [f"record {index}" for index in range(self._infos[shard].records)]


def _sidecar_path(root: str | Path, shard: str) -> Path:
    return Path(root, f"{shard}.json")


def _tar_size_and_hash(sidecar: Path) -> tuple[int, str] | None:
    """Return size and hash of the tar next to a sidecar, the hash from its index."""
    try:
        with open(sidecar.with_suffix(".idx"), errors="replace") as file:
            _, _, digest, *_ = file.readline().split("\t")
        return sidecar.with_suffix(".tar").stat().st_size, digest
    except (OSError, ValueError):
        return None


def _open_finished_labels(root: str | Path, images: ShardSet, **options: Any) -> ShardSet:
    """Open a label set by its manifest; if no image has a label, the error gives the reason."""
    try:
        return open_set(root, **options)
    except ShardError:
        done = {} if is_remote(str(root)) else _read_done_sidecars(root, images)
        if done and not any(sidecar.records for sidecar in done.values()):
            raise _no_labels_error(root, images, done) from None
        raise


def _no_labels_error(root: str | Path, images: ShardSet, done: Mapping[str, LabelSidecar]) -> ShardError:
    reasons = Counter(reason for sidecar in done.values() for reason in sidecar.skipped.values())
    reason, count = reasons.most_common(1)[0]
    return ShardError(
        f"{root}: no image of {images.name} has a label, {count} of {images.records} for this reason: {reason}",
        ["remove that folder and type ", PSEUDOLABEL_COMMAND],
    )


def _read_done_sidecars(root: str | Path, images: ShardSet) -> dict[str, LabelSidecar]:
    files = set(os.listdir(root)) if os.path.isdir(root) else set()
    done = {}
    for shard in images.shards:
        sidecar = read_label_sidecar(root, shard.name) if f"{shard.name}.json" in files else None
        if sidecar is not None:
            done[shard.name] = sidecar
    return done


def _select_shards(root: str, done: Mapping[str, LabelSidecar], only: Sequence[str] | None) -> Sequence[str]:
    for name in only or ():
        if name not in done:
            raise ShardError(
                f"{root}: the labels of shard {name}, which this run uses, are missing",
                ["type ", PSEUDOLABEL_COMMAND],
            )
    return list(done) if only is None else only


def _manifest_rows_and_meta(
    root: str | Path, images: ShardSet, done: Mapping[str, LabelSidecar]
) -> tuple[list[ShardInfo], dict[str, Any]]:
    """Return the shards and the metadata of a manifest.

    Raises:
        ShardError: The shards have different settings or label other images.
    """
    first = next(iter(done.values()), None)
    settings = first if first else LabelSettings({}, "", "")
    for name, sidecar in done.items():
        _check_same_settings(root, name, sidecar, settings)
    hashes = {name: sidecar.image.hash for name, sidecar in done.items()}
    _check_image_hashes(root, images, hashes)
    rows = [ShardInfo(name, s.records, s.bytes, s.hash) for name, s in done.items() if s.records]
    teacher, image_license = settings.teacher, images.meta.get("licence")
    unit = {}
    if "quantity" in teacher:
        unit = {"unit": "1/m" if teacher.get("unit") in ("m", "1/m") else "relative"}
    meta = {
        "kind": "labels",
        "licence": combine_licenses([image_license, teacher.get("licence")]),
        "quantity": "disparity",
        **unit,
        "teacher": teacher,
        "preprocessing": settings.preprocessing,
        "codec": settings.codec,
        "skipped": sum(len(sidecar.skipped) for sidecar in done.values()),
        "images": {"set": images.name, "licence": image_license, "hashes": hashes},
    }
    return rows, meta


def _check_same_settings(
    root: str | Path, shard: str, settings: LabelSettings, expected: LabelSettings
) -> None:
    if settings.teacher["fingerprint"] != expected.teacher["fingerprint"]:
        raise ShardError(
            f"{root}/{shard} was labeled by {settings.teacher_name}, not by {expected.teacher_name}, and labels of two "
            "teachers are not mixed",
            _OTHER_FOLDER,
        )
    if settings.conversion != expected.conversion:
        theirs, ours = ("/".join(map(str, each.conversion)) for each in (settings, expected))
        what = f"its labels were made from {theirs}, not from {ours}"
        if "quantity" not in settings.teacher:
            what = f"its labels are the unconverted depth of {settings.teacher_name}, by an older version"
        raise ShardError(f"{root}/{shard}: {what}", _OTHER_FOLDER)
    for name in ("preprocessing", "codec"):
        theirs, ours = getattr(settings, name), getattr(expected, name)
        if theirs != ours:
            raise ShardError(f"{root}/{shard} was made with {name} {theirs!r}, not {ours!r}", _OTHER_FOLDER)


def _image_hashes(labels: ShardSet) -> dict[str, str]:
    try:
        return labels.meta["images"]["hashes"]
    except (KeyError, TypeError):
        raise ShardError(
            f"{labels.root} is not a label set", ["make one with ", PSEUDOLABEL_COMMAND]
        ) from None


def _check_image_hashes(root: str | Path, images: ShardSet, hashes: Mapping[str, str]) -> None:
    known = {shard.name: shard.hash for shard in images.shards}
    for name, digest in hashes.items():
        if known.get(name) != digest:
            raise _other_images_error(root, images, name)


def _other_images_error(root: str | Path, images: ShardSet, shard: str) -> ShardError:
    return ShardError(
        f"{root}/{shard} labels other images than those of {images.root}/{shard}", _OTHER_FOLDER
    )
