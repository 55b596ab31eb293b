"""torchrun on two nodes, here two agents on loopback: the weights are those of one group, and restarts continue."""

import signal
import socket
import sys
from pathlib import Path

import pytest
from fork_server import ForkedCommand, ForkServer

from .conftest import RECORDING, SMALL, StartRanks, environment
from .test_signal_matrix import model_digest

GIVEN = ("stage=teacher", "steps=7", "validation.every=100", "hang_timeout=20")


class Agents:
    """Two torchrun agents with one worker each."""

    def __init__(
        self, server: ForkServer, folder: Path, data: str, *, restarts: int = 0, **extra: str
    ) -> None:
        """Start both; the first holds the rendezvous."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.errors = [folder / f"agent-{rank}.txt" for rank in (0, 1)]
        launch = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--local-addr=127.0.0.1"]
        launch += [f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id={port}"]
        places = [f"data_dir={data}", f"output_dir={folder / 'outputs'}", "workers=1"]
        trainer = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=2"]
        self.processes: list[ForkedCommand] = []
        for errors in self.errors:
            errors.unlink(missing_ok=True)
            node = [f"--max-restarts={restarts}", str(RECORDING)]
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                *launch,
                *node,
                *SMALL,
                *places,
                *trainer,
            ]
            env = environment(SAMPLE_LOG=str(folder), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", **extra)
            self.processes.append(
                server.start([*command, *GIVEN], cwd=folder, env=env, stdout=errors, stderr=errors)
            )

    def wait(self) -> list[int]:
        """Return the exit codes."""
        return [process.wait(300) for process in self.processes]

    def log(self, rank: int) -> str:
        """Return what an agent and its worker have printed."""
        return self.errors[rank].read_text()


@pytest.fixture(scope="module")
def data(start_ranks: StartRanks, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The folder of the scenes, and the digest of the model of one group of two ranks."""
    folder = tmp_path_factory.mktemp("one-group")
    runs = start_ranks(folder, *GIVEN, f"data_dir={folder / 'data'}", ranks=2)
    assert [run.code for run in runs] == [0, 0], runs[0].stderr
    return str(folder / "data"), model_digest(folder)


@pytest.mark.heavy
def test_two_nodes_train_the_weights_of_one(
    fork_server: ForkServer, tmp_path: Path, data: tuple[str, str]
) -> None:
    """A worker of the second node dies after step 6: torchrun starts all workers again, and they resume."""
    agents = Agents(fork_server, tmp_path, data[0], restarts=1, DIE_AT="6:1")
    assert agents.wait() == [0, 0], agents.log(0) + agents.log(1)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in agents.log(0) + agents.log(1)
    assert model_digest(tmp_path) == data[1]


def test_a_node_that_is_lost_ends_the_other(
    fork_server: ForkServer, tmp_path: Path, data: tuple[str, str]
) -> None:
    agents = Agents(fork_server, tmp_path, data[0], LOSE_NODE_AT="2:1")
    codes = agents.wait()
    assert sorted(codes) == [-signal.SIGKILL, 1]
    log = agents.log(codes.index(1))
    assert "another rank has ended" in log, log
    assert "Traceback" not in log.partition("torch/distributed/elastic")[0], log
