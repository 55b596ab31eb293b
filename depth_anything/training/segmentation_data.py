"""The DataModule of stage=segmentation: sets with class maps as one endless stream of micro-batches."""

from collections.abc import Mapping, Sequence
from typing import Any

from depth_anything.classes import ClassTable, read_class_table
from depth_anything.data.class_maps import CLASSES_FIELD
from depth_anything.data.reader import Records
from depth_anything.data.segmentation_dataset import SegmentationDataset
from depth_anything.data.shards import open_set
from depth_anything.data.tars import BadRecord
from depth_anything.errors import UserError
from depth_anything.training.data import TrainData


class SegmentationData(TrainData):
    """Sets with class maps, all of the same classes."""

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
        perturb: bool,
        short_side: int | None = None,
        scale_jitter: Sequence[float] = (1.0, 1.0),
        repeat: Mapping[str, int] | None = None,
        run_dir: str,
    ) -> None:
        """Store the settings; `open` reads the manifests.

        Args:
            sets: Set name to folder or URL prefix.
            labels: None; class maps are in the sets.
            seed: As in `TrainData`, as are the arguments that are not described here.
            batch_size: Images per optimizer step, over all devices.
            micro_batch: Images per forward pass and device.
            patch: Patch size of the encoder, pixels.
            streams: Number of streams of the sample order.
            image_size: Side of the square crop, pixels.
            workers: Loader processes per device.
            perturb: Add the parameters of strong color perturbations to the batches.
            short_side: Shorter side of a resized image at a factor of 1, pixels; None: the image's own.
            scale_jitter: Least and largest factor of a sample.
            repeat: Repeats per pass, by set name.
            run_dir: Folder of the run.
        """
        super().__init__(
            sets=sets,
            labels=labels,
            seed=seed,
            batch_size=batch_size,
            micro_batch=micro_batch,
            patch=patch,
            streams=streams,
            image_size=image_size,
            workers=workers,
            sky=None,
            perturb=perturb,
            repeat=repeat,
            run_dir=run_dir,
        )
        self.short_side, self.scale_jitter = short_side, tuple(scale_jitter)

    def open(self) -> SegmentationDataset:
        """Open all sets at the first call.

        Raises:
            UserError: If a set is missing, empty or damaged, has no class maps, or has other classes than the first.
        """
        if self._dataset is None:
            self._check_image_size()
            read_classes(self.sets)
            low, high = self.scale_jitter
            self._dataset = SegmentationDataset(
                [self._open_set(name, root) for name, root in self.sets.items()],
                seed=self.seed,
                streams=self.streams,
                image_size=self.image_size,
                short_side=self.short_side,
                scale_jitter=(low, high),
                perturb=self.perturb,
                repeat=self.repeat or None,
            )
        assert isinstance(self._dataset, SegmentationDataset)
        return self._dataset

    @staticmethod
    def _open_set(name: str, root: str) -> Records:
        records = Records(open_set(root, name=name))
        for shard, _ in records.shards:
            try:
                _, fields = records.read(shard, 0)
            except BadRecord:
                continue
            if CLASSES_FIELD not in fields:
                raise UserError(f"{root} holds images without class maps", "choose a set with classes")
            break
        return records

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data and what it depends on; saved in every checkpoint."""
        return {**super().state_dict(), "short_side": self.short_side}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the data are those of the checkpoint; errors as in `TrainData`."""
        super().load_state_dict(state)
        if state.get("short_side") != self.short_side:
            raise UserError(
                f"this run was started with short_side={state.get('short_side')}, not {self.short_side}",
                "type name=ANOTHER_NAME for another size",
            )


def read_classes(sets: Mapping[str, str]) -> ClassTable:
    """Read the classes of a run's sets from their manifests.

    Raises:
        UserError: If a set has none, they are not the same in all sets, or there is no set.
    """
    tables = {
        name: read_class_table(open_set(root, name=name).meta, str(root)) for name, root in sets.items()
    }
    if not tables:
        raise UserError("there is no set with classes", "type '+sources.labelled.NAME=FOLDER'")
    first = next(iter(tables))
    for name, table in tables.items():
        if [row.name for row in table] != [row.name for row in tables[first]]:
            raise UserError(
                f"the sets {first} and {name} have other classes",
                "write both with the same classes, or train on one of them",
            )
    return tables[first]
