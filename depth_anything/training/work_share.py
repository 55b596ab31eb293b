"""Which shards a labeling process may take, where a store has no conditional writes and so no leases."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from depth_anything.data.store import ObjectStore, Store
from depth_anything.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class WorkShare:
    """The `number`-th of `count` equal shares, from 1.

    Attributes:
        number: Which share.
        count: How many there are.
        leases: Whether the processes of a share keep out of each other's way by leases. Without, there is one process.
    """

    number: int = 1
    count: int = 1
    leases: bool = True

    def select(self, work: Sequence[T]) -> list[T]:
        """Return the part of the work that belongs to the share."""
        return list(work[self.number - 1 :: self.count])

    def __str__(self) -> str:
        """Format as it is typed."""
        return f"{self.number}/{self.count}"


def choose_share(typed: str | None, stores: Sequence[Store]) -> WorkShare:
    """Return the share of this process.

    Args:
        typed: "K/N", or None: all of the work; in a store without conditional writes that of the task of Slurm's array.
        stores: Where labels are written.

    Raises:
        UserError: `typed` is no share, or the array of Slurm is no range.
    """
    leases = all(store.conditional for store in stores if isinstance(store, ObjectStore))
    if typed is None and not leases and "SLURM_ARRAY_TASK_ID" in os.environ:
        task, first, step, count = (
            int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
            for name, default in (("ID", 0), ("MIN", 0), ("STEP", 1), ("COUNT", 1))
        )
        last = int(os.environ.get("SLURM_ARRAY_TASK_MAX", first + (count - 1) * step))
        if (last - first) // step + 1 != count:
            raise UserError(
                f"--array of Slurm has {count} tasks from {first} to {last}, which is a list with gaps",
                "submit a range, as --array=0-7",
            )
        return WorkShare((task - first) // step + 1, count, leases=False)
    number, _, count_text = (typed or "1/1").partition("/")
    if not (number.isdecimal() and count_text.isdecimal()) or not 1 <= int(number) <= int(count_text):
        raise UserError(f"share={typed} is not a share", "type share=3/8 for the third of eight")
    return WorkShare(int(number), int(count_text), leases=leases)
