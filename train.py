"""python train.py stage=teacher | pseudolabel | student | metric [size=paper] [encoder=vits] [key=value …]."""

from pathlib import Path

import hydra

from depth_anything.training.run import main

if __name__ == "__main__":
    configs = str(Path(__file__).resolve().parent / "configs")
    hydra.main(version_base="1.3", config_path=configs, config_name="train")(main)()
