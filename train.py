"""python train.py stage=teacher | pseudolabel | student | metric [size=paper] [encoder=vits] [key=value …]."""

from pathlib import Path

from depth_anything.training.command import run_command

if __name__ == "__main__":
    run_command(Path(__file__).resolve().parent / "configs")
