"""Label sets: for each image shard a shard of labels with the same keys, and NAME.json, which makes it done.

Labels are disparity, larger being nearer, whatever their teacher gives; NAME.json says what that was.

NAME.json is written last. It says what the shard holds, which teacher made it and how, which image shard it
belongs to, and which images have no label and why: images in = labels out + skipped. The manifest follows
when every shard is done; it names the teacher, and of every label shard the hash of its image shard, so that
labels meet no other images than those they were made from.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
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
    """Write NAME.json beside a label shard, which makes it done.

    Args:
        root: folder of the label set.
        info: the label shard, as `write_shard` returned it; records 0 and hash "" when no image had a label.
        image_set: name of the set of images.
        image: the image shard.
        teacher: "fingerprint" of the weights, and what is known of them: "file", "licence", and how its output became
            disparity: "quantity", "unit", "conversion". Without the latter the output is taken for disparity.
        preprocessing: what was done to an image.
        codec: of the labels.
        values: smallest and largest value of all labels.
        skipped: key to reason, of every image without a label.

    Raises:
        ShardError: the images in are not the labels out and those skipped.
    """
    if image.records != info.records + len(skipped):
        raise ShardError(
            f"{root}/{image.name}: {image.records} images do not make {info.records} labels "
            f"and {len(skipped)} skipped"
        )
    content = {
        "name": image.name,
        "records": info.records,
        "bytes": info.bytes,
        "hash": info.hash,
        "image": {"set": image_set, "records": image.records, "hash": image.hash},
        "teacher": dict(teacher),
        "preprocessing": preprocessing,
        "codec": codec,
        "values": list(values),
        "skipped": dict(skipped),
        "version": __version__,
    }
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(_sidecar_path(root, image.name), text.encode())


def read_label_sidecar(root: str | Path, shard: str) -> dict[str, Any] | None:
    """Read NAME.json of a label shard; None where the shard is not done.

    Raises:
        ShardError: it is damaged, belongs to another shard, or the tar beside it is not the one it means.
    """
    path = _sidecar_path(root, shard)
    try:
        content = json.loads(path.read_bytes())
        name, image = content["name"], content["image"]
        wanted = (content["bytes"], content["hash"])
        for key in ("set", "records", "hash"):
            image[key]
        for key in ("records", "skipped", "preprocessing", "codec"):
            content[key]
        content["teacher"]["fingerprint"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is damaged", _LABEL_AGAIN) from error
    if name != shard:
        raise ShardError(f"{path} is that of shard {name}", ["put the files back, or ", *_LABEL_AGAIN])
    if content["records"] and _tar_size_and_hash(path) != wanted:
        raise ShardError(f"{path} does not belong to the tar next to it", _LABEL_AGAIN)
    return content


def finish_labels(root: str | Path, images: ShardSet) -> ShardSet | None:
    """Write the manifest of a label set when every shard of the images is done.

    Any number of processes may do so. Shards of whose images none has a label are left out.

    Returns:
        The set, or None as long as a shard is not done, or its NAME.json is damaged or another tar's.

    Raises:
        ShardError: shards by different teachers, or of other images, or no image has a label.
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
        root: folder of the label set, or of a finished one a URL prefix.
        images: what the labels were made from.
        allow_partial: take the shards that are done of an unfinished set.
        only: with allow_partial, take these shards and no others.

    Raises:
        ShardError: an unfinished set, labels by different teachers, of other images, swapped or damaged.
    """
    root = str(root).rstrip("/")
    finished = is_remote(root) or Path(root, "manifest.json").is_file()
    if not finished and not os.path.isdir(root):
        raise ShardError(
            f"{root} is not a folder", [f"make the labels of {images.name} with ", PSEUDOLABEL_COMMAND]
        )
    if finished and (is_remote(root) or not allow_partial):
        labels = _open_finished_labels(root, images, name=images.name)
        hashes = _image_hashes(labels)
    else:
        done = _read_done_sidecars(root, images)
        if not allow_partial:
            raise ShardError(
                f"{root} is not finished, {len(done)} of {len(images.shards)} shards are done",
                [
                    "type ",
                    PSEUDOLABEL_COMMAND,
                    " to go on, or give allow_partial=true to use the finished ones",
                ],
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
    """A label set that is being made, by any number of processes.

    Attributes:
        root: its folder.
        images: the set it labels.
        codec: of the labels.
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
        """Look whether labels that are there already could stand beside this teacher's.

        Args:
            root: folder; made with the first shard.
            images: the set to label.
            teacher: as `write_label_sidecar` takes it.
            preprocessing: what is done to an image.
            codec: "q12" or "f32".

        Raises:
            ShardError: the folder has labels by another teacher, made otherwise, or of other images; or it is none.
        """
        if is_remote(str(root)):
            raise ShardError(f"labels are written to a folder, and {root} is an address: type labels=FOLDER")
        self.root, self.images, self.codec = str(root), images, codec
        self._made: dict[str, Any] = {
            "teacher": dict(teacher),
            "preprocessing": preprocessing,
            "codec": codec,
        }
        self._infos = {shard.name: shard for shard in images.shards}
        self._done: set[str] = set()
        self._reader = ShardReader()
        for name in self._infos:
            if self.done(name):  # one speaks for all, and looking at each would take minutes
                break

    def done(self, shard: str) -> bool:
        """Say whether a shard has its labels.

        Raises:
            ShardError: it has, but by another teacher, made otherwise, or of other images.
        """
        if shard not in self._done:
            try:
                content = read_label_sidecar(self.root, shard)
            except ShardError:
                return False  # damaged, or its maker died while replacing it: made anew
            if content is None:
                return False
            _check_same_settings(self.root, shard, content, self._made)
            if content["image"]["hash"] != self._infos[shard].hash:
                raise _other_images_error(self.root, self.images, shard)
            self._done.add(shard)
        return True

    def count_unlabeled_images(self) -> int:
        """Images of the shards that are not done."""
        return sum(shard.records for shard in self.images.shards if not self.done(shard.name))

    def publish(self, shard: str, labels: Mapping[int, bytes], failed: Sequence[tuple[int, str]]) -> None:
        """Write a shard of labels and its NAME.json.

        Args:
            shard: name of the image shard.
            labels: number of the record in the image shard, to the encoded disparity.
            failed: number and reason of the images without a label.

        Raises:
            ShardError: an image is in both, or in neither.
        """
        image = self._infos[shard]
        if sorted([*labels, *(index for index, _ in failed)]) != list(range(image.records)):
            raise ShardError(
                f"{self.root}/{shard}: not every image of {image.records} has one label or one reason"
            )
        keys = self.keys(shard)
        Path(self.root).mkdir(parents=True, exist_ok=True)
        Path(self.root, "manifest.json").unlink(missing_ok=True)  # of a finished set a shard is made anew
        path = Path(self.root, f"{shard}.tar")
        info = ShardInfo(shard, 0, 0, "")
        if labels:
            field = f"disparity.{self.codec}"
            info = write_shard(path, ((keys[i], {field: labels[i]}) for i in sorted(labels)))
        ranges = [map_codec.value_range(label) for label in labels.values()] or [(0.0, 0.0)]
        write_label_sidecar(
            self.root,
            info,
            image_set=self.images.name,
            image=image,
            values=(min(low for low, _ in ranges), max(high for _, high in ranges)),
            skipped={keys[index]: reason for index, reason in failed},
            **self._made,
        )
        self._done.add(shard)

    def finish(self) -> bool:
        """Write the manifest if every shard is done; say whether."""
        return all(map(self.done, self._infos)) and finish_labels(self.root, self.images) is not None

    def keys(self, shard: str) -> list[str]:
        """Name the images of a shard, in its order; by their numbers where nothing of it can be read."""
        try:
            return self._reader.keys(self.images.url(shard))
        except ShardError:
            return [f"record {index}" for index in range(self._infos[shard].records)]


def _sidecar_path(root: str | Path, shard: str) -> Path:
    return Path(root, f"{shard}.json")


def _tar_size_and_hash(sidecar: Path) -> tuple[int, str] | None:
    """Return bytes and hash of the tar beside a sidecar, as far as its index tells."""
    try:
        with open(sidecar.with_suffix(".idx"), errors="replace") as file:
            _, _, digest, *_ = file.readline().split("\t")
        return sidecar.with_suffix(".tar").stat().st_size, digest
    except (OSError, ValueError):
        return None


def _open_finished_labels(root: str | Path, images: ShardSet, **how: Any) -> ShardSet:
    """Open a label set by its manifest; where no image has a label, the error says why."""
    try:
        return open_set(root, **how)
    except ShardError:
        done = {} if is_remote(str(root)) else _read_done_sidecars(root, images)
        if done and not any(content["records"] for content in done.values()):
            raise _no_labels_error(root, images, done) from None
        raise


def _no_labels_error(root: str | Path, images: ShardSet, done: Mapping[str, dict[str, Any]]) -> ShardError:
    reasons = Counter(reason for content in done.values() for reason in content["skipped"].values())
    reason, count = reasons.most_common(1)[0]
    return ShardError(
        f"{root}: no image of {images.name} has a label, {count} of {images.records} for this reason: {reason}",
        ["remove that folder and type ", PSEUDOLABEL_COMMAND],
    )


def _read_done_sidecars(root: str | Path, images: ShardSet) -> dict[str, dict[str, Any]]:
    known = set(os.listdir(root)) if os.path.isdir(root) else set()
    done = {}
    for shard in images.shards:
        content = read_label_sidecar(root, shard.name) if f"{shard.name}.json" in known else None
        if content is not None:
            done[shard.name] = content
    return done


def _select_shards(root: str, done: Mapping[str, Any], only: Sequence[str] | None) -> Sequence[str]:
    for name in only or ():
        if name not in done:
            raise ShardError(
                f"{root}: the labels of shard {name}, which this run uses, are gone",
                ["type ", PSEUDOLABEL_COMMAND],
            )
    return list(done) if only is None else only


def _manifest_rows_and_meta(
    root: str | Path, images: ShardSet, done: Mapping[str, dict[str, Any]]
) -> tuple[list[ShardInfo], dict[str, Any]]:
    """Return the rows and the meta of a manifest; ShardError where shards do not go together."""
    made: Mapping[str, Any] = next(iter(done.values()), {"teacher": {}, "preprocessing": "", "codec": ""})
    for name, content in done.items():
        _check_same_settings(root, name, content, made)
    _check_image_hashes(root, images, {name: content["image"]["hash"] for name, content in done.items()})
    rows = [
        ShardInfo(name, content["records"], content["bytes"], content["hash"])
        for name, content in done.items()
        if content["records"]
    ]
    whose = {"images": images.meta.get("licence"), "teacher": made["teacher"].get("licence")}
    meta = {
        "kind": "labels",
        "licence": combine_licenses(whose.values()),
        "quantity": "disparity",
        **({"unit": _label_unit(made["teacher"])} if "quantity" in made["teacher"] else {}),
        "teacher": made["teacher"],
        "preprocessing": made["preprocessing"],
        "codec": made["codec"],
        "skipped": sum(len(content["skipped"]) for content in done.values()),
        "images": {
            "set": images.name,
            "licence": whose["images"],
            "hashes": {name: content["image"]["hash"] for name, content in done.items()},
        },
    }
    return rows, meta


def _check_same_settings(
    root: str | Path, shard: str, content: Mapping[str, Any], made: Mapping[str, Any]
) -> None:
    theirs, ours = content["teacher"], made["teacher"]
    if theirs["fingerprint"] != ours["fingerprint"]:
        raise ShardError(
            f"{root}/{shard} was labelled by {_describe_teacher(theirs)}, not by {_describe_teacher(ours)}, and "
            "labels of two teachers are not mixed",
            _OTHER_FOLDER,
        )
    if _teacher_conversion(theirs) != _teacher_conversion(ours):
        was, now = ("/".join(map(str, _teacher_conversion(teacher))) for teacher in (theirs, ours))
        what = f"its labels were made of {was}, not of {now}"
        if "quantity" not in theirs:
            teacher = _describe_teacher(theirs)
            what = f"its labels are older than the conversion to disparity: the depth of {teacher} as it came"
        raise ShardError(f"{root}/{shard}: {what}", _OTHER_FOLDER)
    for what in ("preprocessing", "codec"):
        if content[what] != made[what]:
            raise ShardError(
                f"{root}/{shard} was made with {what} {content[what]!r}, not {made[what]!r}", _OTHER_FOLDER
            )


def _teacher_conversion(teacher: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a teacher gives and how it became disparity; older label sets, which do not say it, kept it as it came."""
    return (
        teacher.get("quantity", "disparity"),
        teacher.get("unit", "relative"),
        teacher.get("conversion"),
    )


def _label_unit(teacher: Mapping[str, Any]) -> str:
    """The unit of labels: known where the teacher knows metres."""
    return "1/m" if teacher["quantity"] == "depth" else "relative"


def _describe_teacher(teacher: Mapping[str, Any]) -> str:
    fingerprint = str(teacher["fingerprint"])[:19]
    return f"{teacher['file']} ({fingerprint})" if "file" in teacher else fingerprint


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
    return ShardError(f"{root}/{shard} labels other images than {images.root}/{shard}", _OTHER_FOLDER)
