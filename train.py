"""python train.py stage=teacher | pseudolabel | student [size=paper] [encoder=vits] [key=value …]."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: busy-waiting threads stall on shared cores

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from depth_anything.training.run import main  # noqa: E402


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def train(cfg: DictConfig) -> None:
    main(cfg)


if __name__ == "__main__":
    train()
