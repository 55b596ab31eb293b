"""The DataModule of the fitting stages: sets in, whole micro-batches out, the position kept as one integer."""

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from depth_anything.data.address import is_remote, join_address
from depth_anything.data.dataset import StreamDataset
from depth_anything.data.labels import open_labels
from depth_anything.data.loader import build_stream_loader
from depth_anything.data.reader import JoinedRecords, Records
from depth_anything.data.shards import open_set
from depth_anything.data.tars import BadRecord, ShardSet
from depth_anything.disk import write_new
from depth_anything.scenes.render import write_scenes
from depth_anything.training.batch_plan import format_override, repeat_for_share, select_sets
from depth_anything.training.config import SceneSetConfig


def require_truth(source: Records | JoinedRecords, root: str) -> None:
    """Look at the first record that can be read: a set without depth cannot train anything.

    Raises:
        ValueError: If it has neither depth nor disparity.
    """
    for shard, _ in source.shards:
        with contextlib.suppress(BadRecord):
            _, fields = source.read(shard, 0)
            if not any(name.startswith(("depth.", "disparity.")) for name in fields):
                raise ValueError(
                    f"{root} holds images without depth; label them first with `python train.py stage=pseudolabel`, "
                    "or name a labelled set"
                )
            return


def require_meters(images: ShardSet) -> None:
    """Hold a set's manifest against what metres are learnt from: depth, and in metres.

    Raises:
        ValueError: Naming the set and what its manifest says instead.
    """
    quantity, unit = images.meta.get("quantity"), images.meta.get("unit")
    if (quantity, unit) != ("depth", "m"):
        said = f"{quantity or 'no one quantity'} in {unit or 'no one unit'}"
        raise ValueError(
            f"the set {images.name} cannot teach metres: its manifest says {said}, not depth in m; type sources of "
            "metres alone, as  sources=hypersim  or  sources=own photos=FOLDER"
        )


def write_missing_scenes(scenes: Mapping[str, SceneSetConfig], needed: Collection[str]) -> None:
    """Write the procedural sets that are not complete yet.

    Args:
        scenes: `sources.scenes` of a config.
        needed: Folders that the run reads. Other sets, and remote ones, are not written.
    """
    for scene in scenes.values():
        if scene.root in needed and not is_remote(scene.root):
            write_scenes(**scene.as_dict())


class TrainData(pl.LightningDataModule):
    """Labelled sets, or image sets joined with labels, as one endless stream of micro-batches."""

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
        repeat: Mapping[str, int] | None = None,
        allow_partial: bool = False,
        min_depth: float | None = None,
        max_depth: float | None = None,
        run_dir: str,
    ) -> None:
        """Describe the data; `open` reads the manifests.

        Args:
            sets: Set name to folder or URL prefix: labelled sets, or image sets when `labels` is given.
            labels: Folder of label sets, one a set of the same name.
            seed: Of the order and of every random choice.
            batch_size: Global.
            micro_batch: Images a device takes at once.
            patch: The encoder's, pixels.
            streams: C of the stream; fixed for the life of a run.
            image_size: Side of the square crop, pixels; also the short side frames are resized to.
            workers: Loader processes a device.
            sky: "far" (disparity 0) or "invalid", {set: either}, or None: as each set's manifest says.
            perturb: Send parameters of strong perturbations along.
            cutmix: Send boxes along that are filled from another image of the micro-batch.
            labelled: Set name to folder or URL prefix of labelled sets, of which `mix` chooses.
            mix: Which of them are seen beside `sets`: True, some names, or None.
            images: Set name to folder or URL prefix, of which `replay` chooses: photographs with labels in
                `labels`, or sets with depth or disparity of their own.
            replay: Which of them are seen beside sets in metres, as disparity: True, some names, or None.
            replay_share: Their share of all samples, 0 to 1, as near as whole repeats come.
            repeat: Times a pass for the sets named.
            allow_partial: Train on the finished shards of an unfinished label set.
            min_depth: Metres, of stage=metric: nearer truth is not valid.
            max_depth: Metres, likewise: farther truth is not valid. Without both, targets are disparity.
            run_dir: Where the list of an unfinished label set is frozen.
        """
        super().__init__()
        self.sets, self.labels = dict(sets), labels
        self.seed, self.batch_size, self.micro_batch, self.streams = seed, batch_size, micro_batch, streams
        self.patch, self.image_size, self.workers, self.sky = patch, image_size, workers, sky
        self.perturb, self.cutmix = perturb, cutmix
        self.mix_sets = select_sets(mix, labelled or {}, key="mix")
        self.replay_sets, self.replay_share = select_sets(replay, images or {}, key="replay"), replay_share
        self.repeat, self.allow_partial, self.run_dir = dict(repeat or {}), allow_partial, Path(run_dir)
        self.depth_range = None if min_depth is None or max_depth is None else (min_depth, max_depth)
        self._dataset: StreamDataset | None = None

    def open(self) -> StreamDataset:
        """Open every set, once.

        Raises:
            ValueError: If a set is missing, empty, damaged, its labels unfinished or another teacher's, or, where
                metres are learnt, not in metres.
        """
        if self._dataset is None:
            if self.image_size % self.patch:
                near = max(1, round(self.image_size / self.patch)) * self.patch
                raise ValueError(
                    f"image_size={self.image_size} is no multiple of {self.patch}, as the encoder needs; "
                    f"type image_size={near}"
                )
            sources: list[Records | JoinedRecords] = []
            for name, root in self.sets.items():
                images = open_set(root, name=name)
                if self.depth_range is not None:
                    require_meters(images)
                    sources.append(Records(images))
                else:
                    sources.append(
                        Records(images) if self.labels is None else self._join_labels(name, images)
                    )
                require_truth(sources[-1], root)
            sources += self._open_extra_sets("mix", self.mix_sets) + self._open_extra_sets(
                "replay", self.replay_sets
            )
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
            )
        return self._dataset

    def _open_extra_sets(self, key: str, sets: Mapping[str, str]) -> list[Records | JoinedRecords]:
        """Open the sets that `key` adds: with truth of their own, or photographs that are joined with labels."""
        sources: list[Records | JoinedRecords] = []
        for name, root in sets.items():
            if name in self.sets:
                what, group = ("a set of images with labels", "labelled")
                if key == "replay":
                    what, group = ("a set in metres", "images")
                raise ValueError(
                    f"{key} names {name}, which is also {what}; call one of them otherwise: "
                    f"type '+sources.{group}.{name}2={root}' '{key}=[{name}2]'"
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
        # The list of the first rank holds for all.
        write_new(frozen, json.dumps([shard.name for shard in labels.shards]).encode())
        return open_labels(root, images, allow_partial=True, only=json.loads(frozen.read_text()))

    def setup(self, stage: str) -> None:
        """Open the sets on every rank."""
        self.open()

    def train_dataloader(self) -> DataLoader:
        """Build the endless loader from the step the run stands at (restored before Lightning calls this)."""
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
        """Tell where the stream stands and what it was cut from; kept in every checkpoint."""
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
            "sets": self.digests(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold the sets of today against those of the checkpoint.

        Raises:
            ValueError: If a set has changed, what its sky means, how often it comes, or the seed or the number of
                streams.
        """
        now = self.digests()
        for name in sorted(now.keys() | state["sets"].keys()):
            if state["sets"].get(name) != now.get(name):
                how = "is new to" if name not in state["sets"] else "is not the one of"
                how = "is missing, and belongs to" if name not in now else how
                raise ValueError(
                    f"the set {name} {how} this run (its manifest's digest is kept in the checkpoint); "
                    "put the old shards back, or type name=ANOTHER_NAME for a new run"
                )
        for key, today in (("seed", self.seed), ("streams", self.streams), ("batch_size", self.batch_size)):
            if state[key] != today:
                raise ValueError(f"this run was begun with {key}={state[key]}; type {key}={state[key]}")
        if state.get("repeat", self.repeat) != self.repeat:
            raise ValueError(
                "this run was begun with another repeat; type  "
                f"{format_override('data.repeat', state['repeat'] or None)}"
            )
        share = self.replay_share if self.replay_sets else None
        if state.get("replay_share") != share:
            raise ValueError(
                f"this run was begun with replay_share={state.get('replay_share')}, now it is {share}; "
                "type name=ANOTHER_NAME for another share"
            )
        was = state.get("depth_range")
        if (was and tuple(was)) != self.depth_range:
            told_range = f"min_depth={was[0]} max_depth={was[1]}" if was else "disparity"
            raise ValueError(
                f"this run was begun with {told_range}; type name=ANOTHER_NAME for another range"
            )
        then = state.get("sky", dict.fromkeys(now, "far"))
        changed = [name for name, policy in self.open().sky.items() if then[name] != policy]
        if changed:
            raise ValueError(
                f"this run was begun with the sky of {changed[0]} {then[changed[0]]}, now it is "
                f"{self.open().sky[changed[0]]}; type  {format_override('sky', then)}"
            )

    def digests(self) -> dict[str, str]:
        """Name every set and the digest of its manifest."""
        return {source.name: source.digest for source in self.open().sources}
