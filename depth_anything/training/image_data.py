"""The DataModule of stage=pretrain: images without labels, in the order and with the checks of other stages."""

from collections.abc import Mapping, Sequence

from depth_anything.data.image_dataset import ImageDataset
from depth_anything.data.reader import Records
from depth_anything.data.shards import open_set
from depth_anything.errors import UserError
from depth_anything.training.data import TrainData


class ImageData(TrainData):
    """Sets of images as one endless stream of micro-batches; the depth of labeled sets is not read."""

    def __init__(
        self,
        *,
        sets: Mapping[str, str],
        seed: int,
        batch_size: int,
        micro_batch: int,
        patch: int,
        streams: int,
        image_size: int,
        workers: int,
        crop_area: Sequence[float],
        repeat: Mapping[str, int] | None = None,
        run_dir: str,
    ) -> None:
        """Store the settings; `open` reads the manifests.

        Args:
            sets: Set name to folder or URL prefix.
            seed: Seed of the sample order and of every random choice.
            batch_size: Images per optimizer step, over all devices.
            micro_batch: Images per forward pass and device.
            patch: Side of the encoder's patches, pixels.
            streams: Number of streams of the sample order; constant for a run.
            image_size: Side of the square crop, pixels.
            workers: Loader processes per device.
            crop_area: Smallest and largest share of an image that a crop covers.
            repeat: Repeats per pass, by set name.
            run_dir: The run folder.
        """
        super().__init__(
            sets=sets,
            labels=None,
            seed=seed,
            batch_size=batch_size,
            micro_batch=micro_batch,
            patch=patch,
            streams=streams,
            image_size=image_size,
            workers=workers,
            sky=None,
            perturb=False,
            repeat=repeat,
            run_dir=run_dir,
        )
        self.crop_area = (float(crop_area[0]), float(crop_area[1]))

    def open(self) -> ImageDataset:
        """Open all sets at the first call.

        Raises:
            UserError: If a set is missing, empty or damaged, or there is none.
        """
        if self._dataset is None:
            if not self.sets:
                raise UserError("there are no images to pretrain on", "type '+sources.images.NAME=FOLDER'")
            self._check_image_size()
            self._dataset = ImageDataset(
                [Records(open_set(root, name=name)) for name, root in self.sets.items()],
                seed=self.seed,
                streams=self.streams,
                image_size=self.image_size,
                patch=self.patch,
                crop_area=self.crop_area,
                repeat=self.repeat or None,
            )
        assert isinstance(self._dataset, ImageDataset)
        return self._dataset
