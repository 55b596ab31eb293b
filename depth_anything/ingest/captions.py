"""Images with captions as shards: photographs, or the records of existing shards, each with its text (field `txt`).

Captions are in a folder, NAME.txt for the image NAME.jpg, or in a table: csv, tsv or jsonl with a column for the file
and one for the caption. A table may have several captions of an image: a list, or a row each.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from depth_anything.data.captions import CAPTION_FIELD, encode_captions
from depth_anything.data.reader import Records
from depth_anything.data.shards import open_set, read_stored_shard, write_manifest
from depth_anything.data.store import FolderStore, Store, open_store
from depth_anything.data.tars import BadRecord, ShardError, ShardInfo, ShardSet, write_shard
from depth_anything.disk import remove_stale
from depth_anything.errors import UserError
from depth_anything.ingest.file_list import unescape_field
from depth_anything.ingest.photographs import PhotographSource
from depth_anything.ingest.shard_job import publish_shard, write_json
from depth_anything.ingest.source import DatasetInfo, RawSample
from depth_anything.ingest.writer import (
    RejectedFiles,
    check_same_settings,
    claim_store,
    default_set_name,
    is_shard_complete,
)
from depth_anything.licenses import check_license
from depth_anything.progress import ProgressLine

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
TEXT_SUFFIXES = (".txt", ".json", *TABLE_SUFFIXES)
FILE_COLUMNS = ("file", "file_name", "filename", "path", "image", "name", "key")
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt")
NO_CAPTION = "no caption"

INFO = DatasetInfo(
    name="captions",
    title="images with captions",
    records=0,
    layout="images, and NAME.txt for each or a table",
    get="your own",
    licence="",
)


@dataclass(frozen=True)
class CaptionSource:
    """Captions by the name of an image; cheap to create and to send to other processes.

    Attributes:
        path: A folder of NAME.txt, or a csv, tsv or jsonl file.
    """

    path: Path

    @property
    def setting(self) -> str:
        """What a set remembers of its captions: the hash of the table, or "txt" for a folder."""
        self.check()
        return "txt" if self.path.is_dir() else "sha256:" + hashlib.sha256(self.path.read_bytes()).hexdigest()

    def check(self) -> None:
        """Check that the captions exist and can be read.

        Raises:
            UserError: They do not, or the table has no column of files or of captions.
        """
        if not self.path.is_dir():
            load_caption_table(self.path)

    def find(self, *names: str) -> list[str]:
        """Return the captions of an image, [] without any.

        Args:
            names: Names that the image may have here: paths relative to the folder of images, or keys.

        Raises:
            ValueError: Its .txt is not UTF-8.
        """
        return next((captions for name in names if (captions := self._find(name))), [])

    def _find(self, name: str) -> list[str]:
        if not self.path.is_dir():
            return load_caption_table(self.path).get(_normalize(name), [])
        folder = self.path.resolve()
        file = (folder / name).with_suffix(".txt") if name else folder
        if not file.resolve().is_relative_to(folder) or not file.is_file():
            return []  # the name of a member of a tar may lead out of the folder
        try:
            text = " ".join(file.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise ValueError(f"{file.name} is not UTF-8 ({error.reason})") from error
        return [text] if text else []


@lru_cache(maxsize=4)
def load_caption_table(path: Path) -> Mapping[str, list[str]]:
    """Read a csv, tsv or jsonl file of captions.

    Returns:
        The file of each row, as a path with "/", to its captions; empty ones are left out.

    Raises:
        UserError: The file is missing, of another kind, damaged, or lacks a column.
    """
    if not path.is_file():
        raise UserError(
            f"there are no captions at {path}", "type a folder of .txt files, or a csv or jsonl file"
        )
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise UserError(
            f"{path} is no table of captions", f"its name must end in {', '.join(TABLE_SUFFIXES)}"
        )
    try:
        rows = list(_read_rows(path))
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error})", "write it as UTF-8, one image a row") from error
    columns = list(dict.fromkeys(name for row in rows for name in row))
    file_column = _find_column(path, columns, FILE_COLUMNS)
    caption_column = _find_column(path, columns, CAPTION_COLUMNS)
    table: dict[str, list[str]] = {}
    for row in rows:
        name, captions = row.get(file_column), row.get(caption_column)
        texts = captions if isinstance(captions, list) else [captions]
        if isinstance(name, str) and name:
            found = table.setdefault(_normalize(name), [])
            found += [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    return table


def _read_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() != ".jsonl":
            yield from csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not an object")
                yield row


def _find_column(path: Path, columns: list[str], names: tuple[str, ...]) -> str:
    lower = {str(column).strip().lower(): column for column in reversed(columns) if column is not None}
    found = next((lower[name] for name in names if name in lower), None)
    if found is None:
        raise UserError(
            f"{path} has the columns {', '.join(map(str, columns)) or '(none)'}, and none is called "
            f"{' or '.join(names)}",
            f"name one of them {names[0]}",
        )
    return found


def _normalize(name: str) -> str:
    return os.path.normpath(name).replace(os.sep, "/")


@dataclass(frozen=True)
class CaptionedPhotographs:
    """A source of photographs with captions for `write_source`; images without one are rejected.

    Attributes:
        captions: Where the captions are.
        leave_out: A folder to skip: the folder that is being written.
    """

    captions: CaptionSource
    leave_out: Path | None = None
    INFO: DatasetInfo = INFO

    @property
    def settings(self) -> dict[str, Any]:
        """What determines the captions."""
        return {"captions": self.captions.setting}

    def find(self, raw: Path) -> Iterable[str]:
        """List the files of the folder, list or tar `raw` without those of captions; see `list_photographs`.

        Raises:
            UserError: There are none, or no caption belongs to any of them.
        """
        first = next(self._lines(raw), None)
        if first is None:
            raise UserError(f"{raw} holds no images", "type the path of a folder, a list of paths, or a tar")
        if not any(self._find(raw, _line_name(line)) for line in self._lines(raw)):
            raise UserError(
                f"no caption of {self.captions.path} belongs to an image of {raw}, as {_line_name(first)}",
                "write paths relative to that folder into the column of files, or name the text NAME.txt",
            )
        yield from self._lines(raw)

    def _lines(self, raw: Path) -> Iterator[str]:
        for line in PhotographSource(self.leave_out).find(raw):
            if not _line_name(line).lower().endswith(TEXT_SUFFIXES):
                yield line

    def read(self, raw: Path, line: str) -> RawSample:
        """Read the image of a line and its captions."""
        captions = self._find(raw, _line_name(line))
        if not captions:
            raise ValueError(NO_CAPTION)
        sample = PhotographSource(self.leave_out).read(raw, line)
        return RawSample(sample.image, captions=captions)

    def _find(self, raw: Path, name: str) -> list[str]:
        folder = os.path.abspath(raw if raw.is_dir() else raw.parent)
        return self.captions.find(name, os.path.join(folder, name))


def _line_name(line: str) -> str:
    return unescape_field(line.partition("\t")[0])


def write_captioned_set(
    source: str,
    captions: str | Path,
    root: str | Path,
    *,
    name: str | None = None,
    licence: str | None = None,
) -> ShardSet:
    """Copy a set of shards with a caption for each record; labels stay. An interrupted set is continued.

    A record is found in the captions by the `name` in its json, its key, or the last part of its key. Records without
    a caption are left out, counted in the manifest and named in NAME.skipped.json.

    Args:
        source: Folder or URL prefix of a set of shards.
        captions: As `CaptionSource.path`.
        root: Folder of the new set.
        name: Its name. None: the name of the folder.
        licence: SPDX identifier of the images. None: that of `source`.

    Raises:
        ShardError: `root` holds another set, or no record has a caption.
    """
    images, texts, store = open_set(source), CaptionSource(Path(captions)), open_store(root)
    name = name or default_set_name(store)
    settings: dict[str, Any] = {
        "source": INFO.name,
        "images": images.digest,
        "captions": texts.setting,
        "name": name,
    }
    settings |= {"per_shard": max(shard.records for shard in images.shards)}
    check_same_settings(store, settings)
    claim_store(store, settings)
    if isinstance(store, FolderStore):
        remove_stale(store.path)
    existing = store.names()
    with ProgressLine(f"writing {store.root}", total=images.records) as progress:
        written = [_copy_shard(images, shard, texts, store, existing, progress) for shard in images.shards]
    existing = store.names()
    rejected_files = [file for shard in images.shards if (file := _skipped_file(shard)) in existing]
    rejected = RejectedFiles(json.loads(store.read(file)) for file in rejected_files)
    shards = [info for info in written if info is not None]
    if not shards:
        first = "; ".join(f"{key}: {reason}" for key, reason in rejected.named[:2])
        raise ShardError(
            f"no record of {source} has a caption ({first})", f"remove it with  {store.remove_command}"
        )
    meta = {key: value for key, value in images.meta.items() if key not in ("settings", "listing", "skipped")}
    meta |= {"settings": settings, **rejected.manifest_summary()}
    meta |= {"licence": check_license(licence)} if licence else {}
    return write_manifest(store.root, name=name, shards=shards, meta=meta)


def _skipped_file(shard: ShardInfo) -> str:
    return f"{shard.name}.skipped.json"


def _copy_shard(
    images: ShardSet,
    shard: ShardInfo,
    captions: CaptionSource,
    store: Store,
    existing: set[str],
    progress: ProgressLine,
) -> ShardInfo | None:
    """Write the captioned records of a shard unless that is done; return None if no record has a caption."""
    skipped = _skipped_file(shard)
    if is_shard_complete(store, shard.name, existing):
        progress.update(shard.records)
        return read_stored_shard(store, shard.name)
    if skipped in existing and len(json.loads(store.read(skipped))) == shard.records:
        progress.update(shard.records)
        return None
    with store.staging() as folder:
        records = _captioned_records(images, shard, captions, folder / skipped, progress)
        first, info = next(records, None), None
        if first is not None:
            info = write_shard(folder / f"{shard.name}.tar", chain([first], records))
        publish_shard(store, folder, shard.name)
    return info


def _captioned_records(
    images: ShardSet, shard: ShardInfo, captions: CaptionSource, skipped: Path, progress: ProgressLine
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the records of a shard that have a caption; name the others at the end, before the shard is visible."""
    source, rejected = Records(images), []
    for index in range(shard.records):
        key = f"record {index}"
        try:
            key, fields = source.read(f"{images.name}/{shard.name}", index)
            texts = captions.find(*_record_name(fields), key, key.rpartition("/")[2])
            if not texts:
                raise ValueError(NO_CAPTION)
        except BadRecord as error:
            rejected.append((error.key or key, error.reason))
        except ValueError as error:
            rejected.append((key, str(error)))
        else:
            yield key, {**fields, CAPTION_FIELD: encode_captions(texts)}
        progress.update()
    if rejected:
        write_json(skipped, rejected)


def _record_name(fields: Mapping[str, bytes]) -> list[str]:
    """Return the name of the image file in the json of a record, if there is one."""
    try:
        meta = json.loads(fields.get("json", b"{}"))
    except (ValueError, RecursionError):
        return []
    name = meta.get("name") if isinstance(meta, dict) else None
    return [name] if isinstance(name, str) and name else []
