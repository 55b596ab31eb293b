"""timm is imported without wandb, which would leave folders in the temporary directory."""

import os
import subprocess
import sys

CODE = """
import os, sys
import depth_anything.model.encoder
assert "wandb" not in sys.modules, "timm has imported it"
import wandb
os._exit(0 if wandb.__version__ else 1)
"""


def test_timm_does_not_import_wandb_which_still_can_be_imported(tmp_path):
    """A fake wandb leaves a folder like wandb."""
    (tmp_path / "wandb.py").write_text("__version__ = '1'")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("*wandb*/"))
