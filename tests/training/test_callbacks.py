"""What ranks do together at a step boundary."""

from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from depth_anything.training.callbacks import together


def _rank(rank: int, folder: str, failing: int | None) -> None:
    """Work on one rank of two, and write down how it ended."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

    def work() -> int:
        if rank == failing:
            raise ValueError(f"record {rank} is damaged")
        return 10 + rank

    try:
        told = str(together(2, work))
    except ValueError as error:
        told = f"refused: {error}"
    Path(folder, f"{rank}.txt").write_text(told)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("failing", "told"),
    [(None, "[10, 11]"), (0, "refused: record 0 is damaged"), (1, "refused: record 1 is damaged")],
)
def test_ranks_share_what_came_out_or_stop_together(tmp_path: Path, failing: int | None, told: str) -> None:
    mp.spawn(_rank, args=(str(tmp_path), failing), nprocs=2)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == [told, told]


def test_a_single_process_needs_no_group() -> None:
    assert together(1, lambda: 3) == [3]
    with pytest.raises(KeyError):
        together(1, lambda: {}["a"])
