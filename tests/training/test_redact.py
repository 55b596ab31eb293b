"""Passwords, tokens and signatures of addresses are neither printed nor saved nor compared between runs."""

import logging
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from made_configs import make_config

from depth_anything.data.address import redact_nested, redact_secrets
from depth_anything.training import command, run
from depth_anything.training.config import RunConfig
from depth_anything.training.loggers import wandb_logger
from depth_anything.training.redact import install_redaction, redact_traceback
from depth_anything.training.run_dir import RunDir

CONFIGS = Path(__file__).parents[2] / "configs"
ADDRESS = "https://alice:PASSWORD@host.example/own?X-Amz-Signature=SIGNATURE&token=TOKEN"
SECRETS = ("PASSWORD", "SIGNATURE", "TOKEN", "alice")


def clean(text: str) -> bool:
    return not any(secret in text for secret in SECRETS)


@pytest.mark.parametrize(
    "text",
    [
        ADDRESS,
        f"['stage=teacher', 'photos=\"{ADDRESS}\"']",
        f"{{'own': '{ADDRESS}'}}",
        "https://alice:PASS'PASSWORD@host/x",
        "s3://alice:PASSWORD@bucket/set",
        "Max retries exceeded with url: /own/manifest.json?X-Amz-Signature=SIGNATURE&X-Amz-Date=1",
        "GET /own/0.tar?sig=SIGNATURE HTTP/1.1",
        "/set?a=1&access_token=TOKEN",
        "headers {'Authorization': 'Bearer TOKEN'}",
        "Authorization: Basic TOKEN",
        "pipe:curl -H 'Authorization: Bearer TOKEN' https://host/{}",
        "pipe:aws --token TOKEN s3 cp s3://b/0.tar -",
        f"line one\npipe:curl -u alice:PASSWORD\n{ADDRESS}",
    ],
)
def test_secrets_are_removed_from_addresses_in_any_form(text: str) -> None:
    assert clean(redact_secrets(text)) and redact_secrets(redact_secrets(text)) == redact_secrets(text)


@pytest.mark.parametrize(
    "text",
    ["https://host/a.tar", "keys=3 token count", "user@host", "a?b=1", "recipe.head_lr=1e-4", "line\n  line"],
)
def test_text_without_secrets_is_unchanged(text: str) -> None:
    assert redact_secrets(text) == text


def test_lines_after_a_pipe_command_are_kept() -> None:
    assert redact_secrets("pipe:cat SECRET\nValueError: bad").endswith("\nValueError: bad")


def test_a_nested_config_keeps_its_structure() -> None:
    config = {"a": {"b": [ADDRESS, 1, None]}, "c": True, "d": 0.5}
    assert redact_nested(config) == {"a": {"b": [redact_secrets(ADDRESS), 1, None]}, "c": True, "d": 0.5}


def resolved(address: str, *typed: str) -> RunConfig:
    return make_config("stage=teacher", "sources=own", f"photos='{address}'", *typed)


def make_run(tmp_path: Path, address: str) -> RunDir:
    folder = RunDir(tmp_path / "run")
    folder.claim(resolved(address))
    folder.lock.release()
    folder.checkpoints.mkdir()
    torch.save({"global_step": 1}, folder.checkpoints / "step-000000001.ckpt")
    return folder


def test_the_run_folder_has_no_secret(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ADDRESS)
    for file in folder.path.rglob("*"):
        assert file.is_dir() or clean(file.read_bytes().decode(errors="replace")), file
    assert "host.example/own" in folder.config.read_text()


@pytest.mark.parametrize(
    "renewed",
    [
        "https://alice:PASSWORD@host.example/own?X-Amz-Signature=ANOTHER&token=NEW",
        "https://bob:OTHER@host.example/own",
        "https://host.example/own",
    ],
)
def test_a_new_signature_or_password_is_the_same_run(tmp_path: Path, renewed: str) -> None:
    folder = make_run(tmp_path, ADDRESS)
    assert folder.compare(resolved(renewed)) == []
    folder.config.write_text(
        yaml.safe_dump(resolved(ADDRESS).as_dict())
    )  # an older version saved the secrets
    assert folder.compare(resolved(renewed)) == []


def test_another_host_is_another_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ADDRESS)
    with pytest.raises(ValueError, match="photos|sources|data.sets") as caught:
        folder.compare(resolved(ADDRESS.replace("host.example", "elsewhere.example")))
    assert clean(str(caught.value))


def test_tracebacks_of_all_threads_warnings_and_logs_are_redacted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in ((sys, "excepthook"), (threading, "excepthook"), (warnings, "formatwarning")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    factory = logging.getLogRecordFactory()
    install_redaction()
    try:
        try:
            raise KeyError(ADDRESS) from OSError(f"cause: {ADDRESS}")
        except KeyError as error:
            assert clean(redact_traceback(error)) and "OSError" in redact_traceback(error)
            sys.excepthook(KeyError, error, error.__traceback__)
            record = logging.getLogger("x").makeRecord("x", 40, "f", 1, "at %s", (ADDRESS,), sys.exc_info())
        assert clean(logging.Formatter().format(record))
        thread = threading.Thread(target=lambda: open(f"/nowhere/{ADDRESS}"))
        thread.start()
        thread.join()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            sys.stderr.write(
                warnings.formatwarning(UserWarning(ADDRESS), UserWarning, "f.py", 1, f"x = '{ADDRESS}'")
            )
    finally:
        logging.setLogRecordFactory(factory)
    printed = capsys.readouterr().err
    assert clean(printed)
    assert all(word in printed for word in ("KeyError", "FileNotFoundError", "UserWarning"))


def test_an_internal_error_does_not_make_hydra_print_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(cfg: Any) -> Any:
        raise KeyError(cfg.photos)

    monkeypatch.setattr(run, "resolve_config", broken)
    monkeypatch.chdir(tmp_path)
    typed = ["stage=teacher", "sources=own", f"photos='{ADDRESS}'", "hydra.output_subdir=.hydra"]
    monkeypatch.setattr(sys, "argv", ["train.py", *typed])
    with pytest.raises(SystemExit) as end:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(run.main)()
    assert clean(str(end.value.code)) and "KeyError" in str(end.value.code)
    assert clean("".join(capfd.readouterr()))
    files = list((tmp_path / ".hydra").glob("*.yaml"))
    assert len(files) == 3 and all(clean(file.read_text()) for file in files)


def test_weights_and_biases_does_not_get_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for typed, hidden in ((f"photos={ADDRESS}", True), ("photos=data/own", False)):
        monkeypatch.setattr(sys, "argv", ["train.py", typed])
        logger = wandb_logger(project="p", name="n", folder=str(tmp_path))
        assert ("settings" in logger._wandb_init) == hidden
        assert not hidden or logger._wandb_init["settings"].x_disable_meta


def test_cfg_job_prints_the_config_without_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "install_redaction", lambda: None)  # it would last for the whole process
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    typed = ["stage=teacher", "sources=own", f"photos='{ADDRESS}'", "--cfg", "job"]
    monkeypatch.setattr(sys, "argv", ["train.py", *typed])
    command.run_command(CONFIGS)
    shown = capsys.readouterr().out
    assert "host.example/own" in shown and clean(shown)
