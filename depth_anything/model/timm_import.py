"""Import timm without wandb.

timm imports wandb for its own training logs, which takes a second and creates folders in the temporary directory.
Import this module before timm; `import wandb` still works afterwards.
"""

import sys

_wandb = sys.modules.get("wandb")
sys.modules["wandb"] = None  # type: ignore[assignment]  # importing it raises ImportError, which timm handles
try:
    import timm  # noqa: F401
finally:
    del sys.modules["wandb"]
    if _wandb is not None:
        sys.modules["wandb"] = _wandb
