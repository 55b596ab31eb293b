"""Remove the secrets of addresses from tracebacks, warnings, log records and the files that Hydra writes."""

import logging
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from depth_anything.data.address import redact_secrets


def redact_traceback(error: BaseException) -> str:
    """Format an error and its causes as Python does, without secrets."""
    return redact_secrets("".join(traceback.format_exception(error)))


def install_redaction() -> None:
    """Redact what Python prints by itself: uncaught errors of all threads, warnings, and log records."""
    sys.excepthook = lambda kind, error, trace: print(redact_traceback(error), end="", file=sys.stderr)
    threading.excepthook = lambda uncaught: print(
        redact_traceback(uncaught.exc_value or uncaught.exc_type()), end="", file=sys.stderr
    )
    default_format = warnings.formatwarning
    if default_format.__name__ != "redacted":

        def redacted(*arguments: Any, **keywords: Any) -> str:
            return redact_secrets(default_format(*arguments, **keywords))

        warnings.formatwarning = redacted
        make_record = logging.getLogRecordFactory()
        logging.setLogRecordFactory(lambda *a, **k: _redact_record(make_record(*a, **k)))


def _redact_record(record: logging.LogRecord) -> logging.LogRecord:
    text = record.getMessage()
    if redact_secrets(text) != text:
        record.msg, record.args = redact_secrets(text), ()
    if record.exc_info and record.exc_info[1] is not None:
        record.exc_text = redact_traceback(record.exc_info[1]).rstrip("\n")
    return record


def redact_hydra_files() -> None:
    """Redact the config and the overrides that Hydra writes for hydra.output_subdir or a sweep."""
    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    files = (
        [Path(hydra.sweep.dir) / "multirun.yaml"]
        if hydra.mode is not None and hydra.mode.name == "MULTIRUN"
        else []
    )
    if hydra.output_subdir is not None:
        files += (Path(hydra.runtime.output_dir) / hydra.output_subdir).glob("*.yaml")
    for file in files:
        if file.is_file() and (text := file.read_text()) != redact_secrets(text):
            file.write_text(redact_secrets(text))
