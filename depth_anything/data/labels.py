"""Label sets: for each image shard a shard of pseudo-labels with the same keys, and NAME.json, which marks it as done.

Labels are disparity, larger is nearer, for every kind of teacher; NAME.json records the conversion.

NAME.json is written last. It records what the shard contains, which teacher made it and how, which image shard it
labels, and which images have no label and why: number of images = labels + skipped. The manifest is written when every
shard is done. It records the teacher and, for each label shard, the hash of its image shard, so that labels are never
joined with other images.
"""

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from depth_anything.data import codec as map_codec
from depth_anything.data.address import is_remote
from depth_anything.data.label_sidecar import (
    LabelSettings,
    LabelSidecar,
    read_label_sidecar,
    write_label_sidecar,
)
from depth_anything.data.reader import ShardReader
from depth_anything.data.shards import build_set, open_set, write_manifest
from depth_anything.data.store import FolderStore, is_object_store, open_store
from depth_anything.data.tars import ShardError, ShardInfo, ShardSet, write_shard
from depth_anything.errors import PSEUDOLABEL_COMMAND
from depth_anything.licenses import combine_licenses

_READ_THREADS = 16
_OTHER_FOLDER = ("type ", PSEUDOLABEL_COMMAND, " labels=FOLDER with another folder, or remove this one")


def finish_labels(root: str | Path, images: ShardSet) -> ShardSet | None:
    """Write the manifest of a label set if every shard of the images is done.

    Any number of processes may call it. Shards without any label are left out of the manifest.

    Returns:
        The set, or None if a shard is not done, or its NAME.json is damaged or belongs to another tar.

    Raises:
        ShardError: Shards have different teachers or label other images, or no image has a label.
    """
    if open_store(root).exists("manifest.json"):
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
        root: Folder of the label set, or URL prefix of a finished one; in an object store also of an unfinished one.
        images: The set that was labeled.
        allow_partial: Accept an unfinished set, with the shards that are done.
        only: With `allow_partial`, use exactly these shards.

    Raises:
        ShardError: The set is unfinished or damaged, shards are swapped, have different teachers or label other images.
    """
    root = str(root).rstrip("/")
    writable = not is_remote(root) or is_object_store(root)
    finished = not writable or open_store(root).exists("manifest.json")
    if not finished and not is_remote(root) and not os.path.isdir(root):
        raise ShardError(
            f"{root} is not a folder", [f"make labels of {images.name} with ", PSEUDOLABEL_COMMAND]
        )
    if finished and (not writable or not allow_partial):
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
        store: Folder or address of the label set.
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
            root: Folder, created with the first shard, or address in an object store.
            images: The set to label.
            teacher, preprocessing, codec: As in `LabelSettings`.

        Raises:
            ShardError: The folder has labels with other settings or of other images, or it is not a folder.
        """
        self.store, self.images, self.codec = open_store(root), images, codec
        self._settings = LabelSettings(dict(teacher), preprocessing, codec)
        self._infos = {shard.name: shard for shard in images.shards}
        self._done: set[str] = set()
        self._reader = ShardReader()
        self._listed: set[str] = set()
        self._compared = False
        self.refresh()
        for name in self._infos:
            if self.done(name):  # one is enough: reading all would take minutes
                break

    @property
    def root(self) -> str:
        """Folder or address of the label set."""
        return self.store.root

    def done(self, shard: str, *, ask: bool = False) -> bool:
        """Tell whether a shard has its labels.

        Args:
            shard: Name of the shard.
            ask: Ask an object store now; otherwise what it said at the last `refresh` counts. A folder is always asked.

        Raises:
            ShardError: It has labels with other settings or of other images.
        """
        if shard not in self._done:
            if ask and self.store.is_remote and self.store.exists(f"{shard}.json"):
                self._listed.add(f"{shard}.json")
            if self.store.is_remote and f"{shard}.json" not in self._listed:
                return False
            if self.store.is_remote and self._compared:  # `finish` reads the others
                self._done.add(shard)
                return True
            try:
                sidecar = read_label_sidecar(self.store, shard)
            except ShardError:
                return False  # damaged, or its writer died while replacing it: it is written again
            if sidecar is None:
                return False
            _check_same_settings(self.root, shard, sidecar, self._settings)
            if sidecar.image.hash != self._infos[shard].hash:
                raise _other_images_error(self.root, self.images, shard)
            self._done.add(shard)
            self._compared = True
        return True

    def refresh(self) -> None:
        """Look which shards are done by now; in a folder `done` does."""
        if self.store.is_remote:
            self._listed = self.store.names()

    def count_unlabeled_images(self) -> int:
        """Return the number of images in shards that are not done."""
        return sum(shard.records for shard in self.images.shards if not self.done(shard.name))

    def publish(
        self,
        shard: str,
        labels: Mapping[int, bytes | Mapping[str, bytes]],
        failed: Sequence[tuple[int, str]],
    ) -> None:
        """Write a shard of labels and its NAME.json. In an object store a shard that is done by now is left alone.

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
        if self.store.is_remote and self.store.exists(f"{shard}.json"):
            self._done.add(shard)
            return
        keys = self.keys(shard)
        if isinstance(self.store, FolderStore):
            self.store.path.mkdir(parents=True, exist_ok=True)
        if not self.store.is_remote or "manifest.json" in self._listed:
            self.store.delete("manifest.json")  # when a shard of a finished set is replaced
        info = ShardInfo(shard, 0, 0, "")
        name = f"disparity.{self.codec}"
        records = {
            index: {name: label} if isinstance(label, bytes) else dict(label)
            for index, label in labels.items()
        }
        if records:
            with self.store.staging() as folder:
                path = folder / f"{shard}.tar"
                info = write_shard(path, ((keys[i], records[i]) for i in sorted(records)))
                for file in (path, path.with_suffix(".idx")):
                    self.store.publish(file, replace=True)  # of a process that died before it was done
        ranges = [map_codec.value_range(files[name]) for files in records.values()] or [(0.0, 0.0)]
        facts: dict[str, Any] = {
            "image_set": self.images.name,
            "image": image,
            "teacher": self._settings.teacher,
            "preprocessing": self._settings.preprocessing,
            "codec": self.codec,
            "values": (min(low for low, _ in ranges), max(high for _, high in ranges)),
            "skipped": {keys[index]: reason for index, reason in failed},
        }
        if not write_label_sidecar(self.store, info, **facts, replace=not self.store.is_remote):
            with suppress(ShardError):  # another process was faster, and has the same labels or its own
                read_label_sidecar(self.store, shard)
                self._done.add(shard)
                return
            write_label_sidecar(self.store, info, **facts)
        self._done.add(shard)

    def finish(self) -> bool:
        """Write the manifest if every shard is done; return whether that is so."""
        if not all(map(self.done, self._infos)):
            return False
        if finish_labels(self.root, self.images) is not None:
            return True
        if self.store.is_remote:
            self._discard_damaged_shards()
        return False

    def _discard_damaged_shards(self) -> None:
        """Delete each NAME.json that does not match its tar, so that the shard is labeled again."""
        for shard in self._infos:
            try:
                read_label_sidecar(self.store, shard)
            except ShardError as error:
                print(f"{error.what}; it will be labeled again", file=sys.stderr)
                self.store.delete(f"{shard}.json")
                self._done.discard(shard)

    def keys(self, shard: str) -> list[str]:
        """Return the keys of a shard's images; "record 0", "record 1", … if the shard cannot be read."""
        try:
            return self._reader.keys(self.images.url(shard))
        except ShardError:
            return [f"record {index}" for index in range(self._infos[shard].records)]


def _open_finished_labels(root: str | Path, images: ShardSet, **options: Any) -> ShardSet:
    """Open a label set by its manifest; if no image has a label, the error gives the reason."""
    try:
        return open_set(root, **options)
    except ShardError:
        known = not is_remote(str(root)) or is_object_store(str(root))
        done = _read_done_sidecars(root, images) if known else {}
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
    store = open_store(root)
    files = store.names()
    names = [shard.name for shard in images.shards if f"{shard.name}.json" in files]

    def read(name: str) -> LabelSidecar | None:
        return read_label_sidecar(store, name)

    if store.is_remote:
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            sidecars = list(pool.map(read, names))
    else:
        sidecars = list(map(read, names))
    return {name: found for name, found in zip(names, sidecars, strict=True) if found is not None}


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
