"""The DataModule of the stages that train: opens the sets, builds the loader, and saves the position in the data."""

import contextlib
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from depth_anything.data.address import is_remote, join_address
from depth_anything.data.captions import read_captions
from depth_anything.data.dataset import StreamDataset
from depth_anything.data.intrinsics import focal_from_meta
from depth_anything.data.label_fields import LabelOptions
from depth_anything.data.labels import open_labels
from depth_anything.data.loader import build_stream_loader
from depth_anything.data.reader import JoinedRecords, Records
from depth_anything.data.sample import decode_image_and_meta
from depth_anything.data.shards import open_set
from depth_anything.data.store import is_object_store, open_store
from depth_anything.data.tars import BadRecord, ShardSet
from depth_anything.disk import write_new
from depth_anything.errors import PSEUDOLABEL_COMMAND, UserError
from depth_anything.ingest.writer import SETTINGS_FILE
from depth_anything.scenes.render import write_scenes
from depth_anything.training.batch_plan import format_override, repeat_for_share, select_sets
from depth_anything.training.config import SceneSetConfig

_MAX_SCENE_WORKERS = 8
_PARALLEL_SCENES = 256
"""Smaller procedural sets are rendered in this process: starting workers would take longer."""


def require_truth(source: Records | JoinedRecords, root: str) -> None:
    """Check that the first readable record of a set has depth or disparity.

    Raises:
        UserError: If it has neither.
    """
    for shard, _ in source.shards:
        with contextlib.suppress(BadRecord):
            _, fields = source.read(shard, 0)
            if not any(name.startswith(("depth.", "disparity.")) for name in fields):
                raise UserError(
                    f"{root} holds images without depth",
                    ["label them first with `", PSEUDOLABEL_COMMAND, "`, or choose a labeled set"],
                )
            return


def require_caption(source: Records | JoinedRecords, root: str) -> None:
    """Check that the first readable record of a set has a caption.

    Raises:
        UserError: If it has none.
    """
    for shard, _ in source.shards:
        with contextlib.suppress(BadRecord):
            _, fields = source.read(shard, 0)
            try:
                read_captions(fields, decode_image_and_meta(fields)[1])
            except ValueError as error:
                raise UserError(
                    f"the images of {root} cannot be used for stage=controlnet: {error}",
                    f"add captions with  depth-anything shard captions {root} CAPTIONS OUT  and type sources=own "
                    "photos=OUT",
                ) from error
            return


def require_intrinsics(source: Records | JoinedRecords, root: str) -> None:
    """Check that the first readable record of a set says the focal length of its camera.

    Later records without it are replaced and counted as any other bad record.

    Raises:
        UserError: Naming the record.
    """
    for shard, _ in source.shards:
        try:
            key, fields = source.read(shard, 0)
            image, meta = decode_image_and_meta(fields)
        except ValueError:  # a bad record; the loader replaces and counts it
            continue
        if focal_from_meta(meta, image.shape) is None:
            raise UserError(
                f"{key} of {root} has no intrinsics in its json, and canonical_focal needs its focal length",
                "type canonical_focal=null, leave the set out, or write it again with  "
                "intrinsics: {fx: …, fy: …, cx: …, cy: …}  in its yaml (docs/own-data.md)",
            )
        return


def require_meters(images: ShardSet) -> None:
    """Check that a set holds depth in meters, by its manifest.

    Raises:
        UserError: Naming the set, and the quantity and unit in its manifest.
    """
    quantity, unit = images.meta.get("quantity"), images.meta.get("unit")
    if (quantity, unit) != ("depth", "m"):
        raise UserError(
            f"the set {images.name} cannot be used for stage=metric: its manifest has quantity={quantity} and "
            f"unit={unit}, not depth in m",
            "type sources in meters, as  sources=hypersim  or  sources=own photos=FOLDER",
        )


def needs_labels(images: ShardSet, labels: str | None, *, in_meters: bool, captions: bool) -> bool:
    """Return whether a set is joined with its labels.

    Args:
        images: The set.
        labels: Folder of label sets, if any.
        in_meters: Targets are depth in meters, which a set has itself.
        captions: Images have captions; a set with its own depth or disparity is not joined.
    """
    if labels is None or in_meters:
        return False
    return not (captions and images.meta.get("quantity") is not None)


def require_label_extras(sources: Sequence[Records | JoinedRecords], options: LabelOptions) -> None:
    """Check that the labels of at least one set have the optional fields that a student is asked to use.

    Raises:
        UserError: Naming the label sets, and how to label again.
    """
    labels = [source.labels for source in sources if isinstance(source, JoinedRecords)]
    has = {name for each in labels for name in each.meta["teacher"]}
    roots = ", ".join(each.root for each in labels) or "(there are none)"
    again: Sequence[Any] = ["label into another folder with ", PSEUDOLABEL_COMMAND, " labels=FOLDER "]
    if options.weight != "none" and "confidence" not in has:
        raise UserError(
            f"label_weight={options.weight}, but the labels have no confidence: {roots}",
            [*again, "'teacher=[A,B]' label_confidence=true, or type label_weight=none"],
        )
    if (options.local or options.crop_share) and "crops" not in has:
        key = "recipe.local_weight" if options.local else "crop_share"
        raise UserError(
            f"{key} is above 0, but the labels have no crops: {roots}",
            [*again, f"label_crops=2, or type {key}=0"],
        )


def write_missing_scenes(scenes: Mapping[str, SceneSetConfig], needed: Collection[str]) -> None:
    """Write the procedural sets that are not complete yet.

    Args:
        scenes: `sources.scenes` of a config.
        needed: Folders that the run reads. Other sets, and those of http servers, are not written.
    """
    for scene in scenes.values():
        remote = is_remote(scene.root)
        if scene.root in needed and (not remote or is_object_store(scene.root)):
            cores = min(len(os.sched_getaffinity(0)), _MAX_SCENE_WORKERS)
            if scene.layout != "classic" and _is_older_set(scene.root):
                print(
                    f"note: {scene.root} has the classic layout and is kept; for the {scene.layout} one remove it",
                    file=sys.stderr,
                )
                scene = replace(scene, layout="classic")  # of a run that began before there were layouts
            parallel = cores > 1 and scene.count >= _PARALLEL_SCENES
            write_scenes(scene.root, scene.spec, per_shard=scene.per_shard, workers=cores if parallel else 0)


def _is_older_set(root: str) -> bool:
    """Return whether a folder or address holds scenes that were written when they had one layout."""
    store = open_store(root)
    if not store.exists(SETTINGS_FILE):
        return False
    settings = json.loads(store.read(SETTINGS_FILE))
    return settings.get("source") == "scenes" and "layout" not in settings


class TrainData(pl.LightningDataModule):
    """Labeled sets, or image sets joined with their labels, as one endless stream of micro-batches."""

    def __init__(
        self,
        *,
        sets: Mapping[str, str],
        labels: str | None,
        seed: int,
        batch_size: int,
        micro_batch: int,
        patch: int,
        streams: int,
        image_size: int,
        workers: int,
        sky: str | Mapping[str, str] | None,
        perturb: bool,
        cutmix: bool = False,
        labelled: Mapping[str, str] | None = None,
        mix: bool | str | Sequence[str] | None = None,
        images: Mapping[str, str] | None = None,
        replay: bool | str | Sequence[str] | None = None,
        replay_share: float = 0.1,
        label_weight: str = "none",
        label_threshold: float = 0.5,
        crop_share: float = 0.0,
        local_weight: float = 0.0,
        repeat: Mapping[str, int] | None = None,
        allow_partial: bool = False,
        min_depth: float | None = None,
        max_depth: float | None = None,
        captions: bool = False,
        flip: bool = True,
        canonical_focal: float | None = None,
        run_dir: str,
    ) -> None:
        """Store the settings; `open` reads the manifests.

        Args:
            sets: Set name to folder or URL prefix: labeled sets, or image sets if `labels` is given.
            labels: Folder of label sets, each with the name of its image set.
            seed: Seed of the sample order and of every random choice.
            batch_size: Images per optimizer step, over all devices.
            micro_batch: Images per forward pass and device.
            patch: Patch size of the encoder, pixels.
            streams: Number of streams of the sample order (`data.stream`); constant for a run.
            image_size: Side of the square crop, pixels; frames are resized to this short side.
            workers: Loader processes per device.
            sky: "far" (disparity 0) or "invalid", {set: either}, or None to follow each set's manifest.
            perturb: Add the parameters of strong color perturbations to the batches.
            cutmix: Add boxes to the batches that are filled from another image of the micro-batch.
            labelled: Set name to folder or URL prefix of labeled sets, from which `mix` selects.
            mix: Sets of `labelled` to add: True for all, names, or None.
            images: Set name to folder or URL prefix, from which `replay` selects: photographs with labels in
                `labels`, or sets with their own depth or disparity.
            replay: Sets of `images` to add as disparity in stage=metric: True for all, names, or None.
            replay_share: Share of the replayed sets in all samples, 0 to 1, as close as whole repeats allow.
            label_weight: "none" ignores the confidence of labels, "weight" adds it to the batches, "mask" makes pixels
                below `label_threshold` invalid.
            label_threshold: Smallest confidence of a valid pixel with "mask".
            crop_share: Share of the samples that see one of the label's crops in place of the whole image.
            local_weight: Above 0, the label of one crop is added to each sample that sees the whole image.
            repeat: Repeats per pass, by set name.
            allow_partial: Train on the finished shards of an unfinished label set.
            min_depth, max_depth: Valid depths of stage=metric, meters. Without both, targets are disparity.
            captions: Add captions to the batches. Sets with their own depth or disparity are not joined with labels.
            flip: Mirror half of the samples.
            canonical_focal: As for `StreamDataset`; for stage=metric only.
            run_dir: Folder that keeps the shard list of an unfinished label set.
        """
        super().__init__()
        self.sets, self.labels = dict(sets), labels
        self.seed, self.batch_size, self.micro_batch, self.streams = seed, batch_size, micro_batch, streams
        self.patch, self.image_size, self.workers, self.sky = patch, image_size, workers, sky
        self.perturb, self.cutmix = perturb, cutmix
        self.mix_sets = select_sets(mix, labelled or {}, key="mix")
        self.replay_sets, self.replay_share = select_sets(replay, images or {}, key="replay"), replay_share
        self.label_options = LabelOptions(label_weight, label_threshold, crop_share, local_weight > 0)
        self.repeat, self.allow_partial, self.run_dir = dict(repeat or {}), allow_partial, Path(run_dir)
        self.depth_range = None if min_depth is None or max_depth is None else (min_depth, max_depth)
        self.captions, self.flip = captions, flip
        self.canonical_focal = canonical_focal
        self._dataset: StreamDataset | None = None

    def open(self) -> StreamDataset:
        """Open all sets at the first call.

        Raises:
            UserError: If a set is missing, empty or damaged, its labels are unfinished or another teacher's, or
                stage=metric needs meters and the set has another unit.
        """
        if self._dataset is None:
            self._check_image_size()
            sources: list[Records | JoinedRecords] = []
            for name, root in self.sets.items():
                images = open_set(root, name=name)
                if self.depth_range is not None:
                    require_meters(images)
                in_meters = self.depth_range is not None
                joined = needs_labels(images, self.labels, in_meters=in_meters, captions=self.captions)
                sources.append(self._join_labels(name, images) if joined else Records(images))
                require_truth(sources[-1], root)
                if self.captions:
                    require_caption(sources[-1], root)
                if self.canonical_focal is not None:
                    require_intrinsics(sources[-1], root)
            sources += self._open_extra_sets("mix", self.mix_sets)
            sources += self._open_extra_sets("replay", self.replay_sets)
            require_label_extras(sources, self.label_options)
            repeat = self.repeat
            if self.replay_sets:
                sizes = {name: count for source in sources for name, count in source.shards}
                repeat = repeat_for_share(sizes, self.replay_sets, share=self.replay_share, repeat=repeat)
            self._dataset = StreamDataset(
                sources,
                seed=self.seed,
                streams=self.streams,
                image_size=self.image_size,
                patch=self.patch,
                sky=self.sky,
                perturb=self.perturb,
                cutmix=self.cutmix,
                repeat=repeat or None,
                depth_range=self.depth_range,
                relative=self.replay_sets,
                label_options=self.label_options,
                flip=self.flip,
                captions=self.captions,
                canonical_focal=self.canonical_focal,
            )
        return self._dataset

    def _check_image_size(self) -> None:
        if self.image_size % self.patch:
            nearest = max(1, round(self.image_size / self.patch)) * self.patch
            raise UserError(
                f"image_size={self.image_size} is not a multiple of {self.patch}, which the encoder needs",
                f"type image_size={nearest}",
            )

    def _open_extra_sets(self, key: str, sets: Mapping[str, str]) -> list[Records | JoinedRecords]:
        """Open the sets that `mix` or `replay` adds; photographs without depth are joined with their labels."""
        sources: list[Records | JoinedRecords] = []
        for name, root in sets.items():
            if name in self.sets:
                group = "images" if key == "replay" else "labelled"
                raise UserError(
                    f"{key} names {name}, which is already a set of this stage",
                    f"rename one of them: type '+sources.{group}.{name}2={root}' '{key}=[{name}2]'",
                )
            images = open_set(root, name=name)
            own = key == "mix" or self.labels is None or images.meta.get("quantity") is not None
            sources.append(Records(images) if own else self._join_labels(name, images))
            require_truth(sources[-1], root)
        return sources

    def _join_labels(self, name: str, images: ShardSet) -> JoinedRecords:
        return JoinedRecords(images, self._open_labels(name, images))

    def _open_labels(self, name: str, images: Any) -> Any:
        root = join_address(str(self.labels), name)
        if not self.allow_partial:
            return open_labels(root, images)
        frozen = self.run_dir / f"labels-{name}.json"
        if frozen.is_file():
            return open_labels(root, images, allow_partial=True, only=json.loads(frozen.read_text()))
        labels = open_labels(root, images, allow_partial=True)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        # All ranks use the list of the first that writes it.
        write_new(frozen, json.dumps([shard.name for shard in labels.shards]).encode())
        return open_labels(root, images, allow_partial=True, only=json.loads(frozen.read_text()))

    def setup(self, stage: str) -> None:
        """Open the sets on every rank."""
        self.open()

    def train_dataloader(self) -> DataLoader:
        """Build the endless loader, starting at the trainer's step (Lightning restores it before this call)."""
        trainer = self.trainer
        assert trainer is not None
        return build_stream_loader(
            self.open(),
            micro_batch=self.micro_batch,
            workers=self.workers,
            rank=trainer.global_rank,
            world=trainer.world_size,
            start=trainer.global_step * trainer.accumulate_grad_batches,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data and what it depends on; saved in every checkpoint."""
        assert self.trainer is not None
        return {
            "samples": self.trainer.global_step * self.batch_size,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "streams": self.streams,
            "repeat": self.repeat,
            "sky": self.open().sky,
            "depth_range": self.depth_range,
            "replay_share": self.replay_share if self.replay_sets else None,
            **({} if self.canonical_focal is None else {"canonical_focal": self.canonical_focal}),
            "sets": self.digests(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the data are those of the checkpoint.

        Raises:
            UserError: If a set, its sky, its repeats, the seed, the batch size or the number of streams has changed.
        """
        now = self.digests()
        for name in sorted(now.keys() | state["sets"].keys()):
            if state["sets"].get(name) != now.get(name):
                change = "was not part of" if name not in state["sets"] else "has changed since the start of"
                change = "is missing, but belongs to" if name not in now else change
                raise UserError(
                    f"the set {name} {change} this run (the checkpoint has the digest of its manifest)",
                    "restore the old shards, or type name=ANOTHER_NAME for a new run",
                )
        for key, today in (("seed", self.seed), ("streams", self.streams), ("batch_size", self.batch_size)):
            if state[key] != today:
                raise UserError(
                    f"this run was started with {key}={state[key]}, not {today}", f"type {key}={state[key]}"
                )
        if state.get("repeat", self.repeat) != self.repeat:
            raise UserError(
                "this run was started with another data.repeat",
                f"type  {format_override('data.repeat', state['repeat'] or None)}",
            )
        share = self.replay_share if self.replay_sets else None
        if state.get("replay_share") != share:
            raise UserError(
                f"this run was started with replay_share={state.get('replay_share')}, not {share}",
                "type name=ANOTHER_NAME for another share",
            )
        saved_range = state.get("depth_range")
        if (saved_range and tuple(saved_range)) != self.depth_range:
            values = "disparity"
            if saved_range:
                values = f"min_depth={saved_range[0]} max_depth={saved_range[1]}"
            raise UserError(f"this run was started with {values}", "type name=ANOTHER_NAME for another range")
        if state.get("canonical_focal") != self.canonical_focal:
            saved_focal = "null" if state.get("canonical_focal") is None else state["canonical_focal"]
            raise UserError(
                f"this run was started with canonical_focal={saved_focal}, not {self.canonical_focal or 'null'}",
                f"type canonical_focal={saved_focal}, or name=ANOTHER_NAME for another one",
            )
        saved_sky = state.get("sky", dict.fromkeys(now, "far"))
        for name, policy in self.open().sky.items():
            if saved_sky[name] != policy:
                raise UserError(
                    f"this run was started with the sky of {name} {saved_sky[name]}, not {policy}",
                    f"type  {format_override('sky', saved_sky)}",
                )

    def digests(self) -> dict[str, str]:
        """Return the digest of every set's manifest, by set name."""
        return {source.name: source.digest for source in self.open().sources}
