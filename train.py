"""python train.py stage=teacher | pseudolabel | student | metric [size=paper] [encoder=vits] [key=value …]."""

from pathlib import Path

from depth_anything.training.signals import signals

if __name__ == "__main__":
    signals.listen()  # before the imports that take seconds
    import hydra  # isort: skip
    from depth_anything.training.run import main  # isort: skip

    hydra.main(str(Path(__file__).resolve().parent / "configs"), "train", "1.3")(main)()
