"""NAME.json of a label shard: what the shard holds, and how it was made. It is written last, and marks it as done."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from depth_anything import __version__
from depth_anything.data.address import join_address
from depth_anything.data.store import Store, open_store
from depth_anything.data.tars import ShardError, ShardInfo
from depth_anything.errors import PSEUDOLABEL_COMMAND

_LABEL_AGAIN = ("remove it and type ", PSEUDOLABEL_COMMAND)
_HEADER_BYTES = 512  # more than the first line of an index has


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
    root: str | Path | Store,
    info: ShardInfo,
    *,
    image_set: str,
    image: ShardInfo,
    teacher: Mapping[str, Any],
    preprocessing: str,
    codec: str,
    values: tuple[float, float],
    skipped: Mapping[str, str],
    replace: bool = True,
) -> bool:
    """Write NAME.json next to a label shard, which marks it as done; return whether it was written.

    Args:
        root: Folder, address or store of the label set.
        info: The label shard, from `write_shard`; records 0 and hash "" if no image has a label.
        image_set: Name of the set of images.
        image: The image shard.
        teacher, preprocessing, codec: As in `LabelSettings`.
        values, skipped: As in `LabelSidecar`.
        replace: Replace an existing NAME.json.

    Raises:
        ShardError: The number of images is not labels + skipped.
    """
    store = root if isinstance(root, Store) else open_store(root)
    if image.records != info.records + len(skipped):
        raise ShardError(
            f"{store.root}/{image.name}: {image.records} images, but {info.records} labels and {len(skipped)} skipped"
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
    if not replace:
        return store.write_new(f"{image.name}.json", text.encode())
    store.write(f"{image.name}.json", text.encode())
    return True


def read_label_sidecar(root: str | Path | Store, shard: str) -> LabelSidecar | None:
    """Read NAME.json of a label shard; None if the shard is not done.

    Raises:
        ShardError: It is damaged, belongs to another shard, or does not match the tar next to it.
    """
    store = root if isinstance(root, Store) else open_store(root)
    path = join_address(store.root, f"{shard}.json")
    try:
        content = json.loads(store.read(f"{shard}.json"))
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
    if sidecar.records and _tar_size_and_hash(store, shard) != (sidecar.bytes, sidecar.hash):
        raise ShardError(f"{path} does not match the tar next to it", _LABEL_AGAIN)
    return sidecar


def _tar_size_and_hash(store: Store, shard: str) -> tuple[int | None, str] | None:
    """Return size and hash of the tar of a label shard, the hash from its index."""
    try:
        head = store.read(f"{shard}.idx", first_bytes=_HEADER_BYTES).decode(errors="replace")
        _, _, digest, *_ = head.partition("\n")[0].split("\t")
        return store.size(f"{shard}.tar"), digest
    except (OSError, ValueError):
        return None
