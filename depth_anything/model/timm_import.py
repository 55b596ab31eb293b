"""Imports timm without wandb, which timm imports for log files that nobody writes here.

The import of wandb takes a second and makes folders in the temporary directory, which a killed process leaves there.
Import this module before timm; `import wandb` works as ever afterwards.
"""

import sys

_wandb = sys.modules.get("wandb")
sys.modules["wandb"] = None  # type: ignore[assignment]  # an ImportError, with which timm does without
try:
    import timm  # noqa: F401
finally:
    del sys.modules["wandb"]
    if _wandb is not None:
        sys.modules["wandb"] = _wandb
