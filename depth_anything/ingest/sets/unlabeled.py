"""The eight sets of photographs that the paper labels with its teacher.

A record holds the image, unchanged if every reader shows it alike, and a JSON with `source`, `name` (its path as
published) and `original_size`. The number of records is from the paper's table; where it differs from the authors'
count, docs/datasets.md says what is known.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from depth_anything.ingest.find_files import find_images, read_image_file
from depth_anything.ingest.source import DatasetInfo, RawSample


@dataclass(frozen=True)
class UnlabeledSet:
    """A set of photographs as it is published.

    Attributes:
        INFO: Facts about it.
        kinds: Where its images are: "files", "tars", "lmdb", "videos".
    """

    INFO: DatasetInfo
    kinds: tuple[str, ...] = ("files", "tars")

    def find(self, raw: Path) -> Iterable[str]:
        """List its images; see `find_images`."""
        return find_images(raw, kinds=self.kinds)

    def read(self, raw: Path, line: str) -> RawSample:
        """Read the image of a line."""
        return RawSample(read_image_file(raw, line))


bdd100k = UnlabeledSet(
    DatasetInfo(
        name="bdd100k",
        title="BDD100K",
        records=8_200_000,
        layout="videos/**/*.mov, read at two frames per second, or images/**/*.jpg",
        get="https://bdd-data.berkeley.edu: videos 1.8 TB in 100 parts, or one frame of each 5.3 GB",
        licence="LicenseRef-BDD100K",
    ),
    kinds=("files", "tars", "videos"),
)
landmarks = UnlabeledSet(
    DatasetInfo(
        name="landmarks",
        title="Google Landmarks v2",
        records=4_132_914,
        layout="train/a/b/c/*.jpg, or the tars images_000.tar to images_499.tar as published",
        get="https://github.com/cvdfoundation/google-landmark: 500 tars of 1 GB",
        licence="CC-BY-4.0",
    )
)
imagenet21k = UnlabeledSet(
    DatasetInfo(
        name="imagenet21k",
        title="ImageNet-21K",
        records=13_153_500,
        layout="n01440764.tar and so on, a tar per synset, or folders of images, or timm's webp tars",
        get="https://image-net.org (winter21, 1.15 TB), or timm/imagenet-w21-webp-wds on the hub (646 GB)",
        licence="LicenseRef-ImageNet",
    )
)
lsun = UnlabeledSet(
    DatasetInfo(
        name="lsun",
        title="LSUN",
        records=9_895_373,
        layout="bedroom_train_lmdb/data.mdb and so on, a folder per class, unzipped",
        get="https://www.yf.io/p/lsun: ten zips, 156 GB",
        licence="LicenseRef-LSUN",
    ),
    kinds=("lmdb",),
)
objects365 = UnlabeledSet(
    DatasetInfo(
        name="objects365",
        title="Objects365 v2",
        records=1_742_289,
        layout="patch0/*.jpg to patch50/*.jpg, or their tars",
        get="https://www.objects365.org: 345 GB",
        licence="LicenseRef-Objects365",
    )
)
openimages = UnlabeledSet(
    DatasetInfo(
        name="openimages",
        title="Open Images V7",
        records=7_800_000,
        layout="train_0/*.jpg and so on, or train_0.tar.gz to train_f.tar.gz as published",
        get="https://storage.googleapis.com/openimages/web: 1.74 million hosted, 513 GB; the others by their URLs",
        licence="CC-BY-2.0",
    )
)
places365 = UnlabeledSet(
    DatasetInfo(
        name="places365",
        title="Places365",
        records=6_500_000,
        layout="data_large/a/airfield/*.jpg and so on, or the tars as published",
        get="http://places2.csail.mit.edu: Places365-Challenge, 8,026,628 images",
        licence="LicenseRef-Places365",
    )
)
sa1b = UnlabeledSet(
    DatasetInfo(
        name="sa1b",
        title="SA-1B",
        records=11_185_362,
        layout="sa_000000.tar to sa_000999.tar as published, or folders of sa_*.jpg",
        get="https://ai.meta.com/datasets/segment-anything: 1,000 tars of 11 GB",
        licence="LicenseRef-SA-1B",
    )
)
