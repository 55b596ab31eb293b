"""python train.py stage=teacher | pseudolabel | student | metric | pretrain [encoder=vits] [key=value …]."""

from pathlib import Path

from depth_anything.training.signals import signal_handler

if __name__ == "__main__":
    signal_handler.install()  # before the imports that take seconds
    from depth_anything.training.command import run_command

    run_command(Path(__file__).resolve().parent / "configs")
