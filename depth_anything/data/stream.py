"""The order of training samples, computed instead of stored: which record is sample n, and which samples a rank reads.

The order depends only on the shards, the seed and the number of streams. So a run resumes from one integer, with any
number of devices and loader workers.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import NamedTuple, TypeVar

import numpy as np

from depth_anything.errors import UserError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

SHUFFLE_BLOCK = 256  # records of a stream that are shuffled among themselves
_CACHED_BLOCKS = 8192  # 0.5 KiB each; neighboring samples use as many blocks as there are streams
_CACHED_PASSES = 2  # a micro-batch may contain the end of one pass and the beginning of the next

# What random words are used for. Each purpose has its own Philox key; changing a number changes the order.
_SHARDS, _STREAMS, _BLOCKS = 1, 2, 3
CROP, PERTURBATION, CUTMIX = 16, 17, 18
RESIZED_CROP, PATCH_ORDER = 19, 20


def _philox_words(count: int, seed: int, purpose: int, *index: int) -> np.ndarray:
    """Return `count` raw Philox words (uint64) for a seed, a purpose and up to three integers.

    NumPy promises the same raw words in all its versions, and promises it of nothing else that it draws.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed is an integer from 0 to 2**64 - 1, not {seed}")
    counter = np.zeros(4, np.uint64)  # drawing increments the lowest word; the others hold the index
    counter[1 : 1 + len(index)] = index
    return np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=counter).random_raw(count)


def permutation(length: int, seed: int, purpose: int, *index: int) -> np.ndarray:
    """Return a permutation of range(length), int64: the stable argsort of its Philox words."""
    return np.argsort(_philox_words(length, seed, purpose, *index), kind="stable")


def random_uint64(seed: int, n: int, count: int, *, purpose: int = 0) -> np.ndarray:
    """Return `count` random uint64 of sample `n`; each purpose has its own."""
    return _philox_words(count, seed, purpose, n)


def random_uniform(seed: int, n: int, count: int, *, purpose: int = 0) -> np.ndarray:
    """Return `count` random float64 in [0, 1) of sample `n`; each purpose has its own."""
    return (_philox_words(count, seed, purpose, n) >> np.uint64(11)) * 2.0**-53


class _PassTable(NamedTuple):
    """One pass: the shards in a line, cut into streams."""

    order: np.ndarray  # which shard copy is j-th in the line (π)
    first: np.ndarray  # line position of its first record, and the length of the line last (F)
    begin: np.ndarray  # line position where each stream begins (S)


class Stream:
    """The endless order of training samples over the shards of all sets.

    Each pass puts the shards in a line, in a new random order, and cuts the line into `streams` pieces of equal
    length (up to one record). Sample n comes from piece n % streams; each piece is shuffled within blocks of 256
    records. So every record is read exactly once per pass, and neighboring samples are far apart in the line.

    Attributes:
        records: Samples per pass.
        streams: Pieces read in parallel; fixed for the life of a run.
        seed: Seed of all random orders.
        digest: "sha256:…" of everything that determines the order.
    """

    def __init__(
        self,
        shards: Iterable[tuple[str, int]],
        *,
        seed: int,
        streams: int,
        repeat: Mapping[str, int] | None = None,
    ) -> None:
        """Sort the shards by name.

        Args:
            shards: ("set/name", records) of each shard, in any order.
            seed: From 0 to 2**64 - 1.
            streams: At least 1; may exceed the number of records.
            repeat: How many times per pass a shard ("set/name") or a set ("set") is read; 1 by default.

        Raises:
            ValueError: There are no records, a shard is listed twice, or a number is out of range.
        """
        shards = sorted((str(name), int(records)) for name, records in shards)
        counts = _repeat_counts([name for name, _ in shards], dict(repeat or {}))
        self.seed, self.streams = int(seed), int(streams)
        self._names = [name for name, _ in shards]
        self._sizes = np.array([records for _, records in shards], np.int64)
        self._copies = np.repeat(
            np.arange(len(shards)), counts
        )  # a repeated shard is in the line several times
        self.records = int(self._sizes[self._copies].sum())
        if self.records == 0:
            raise UserError(
                f"there are no records to train on: {len(shards)} shards have 0 records",
                "name a set that has some",
            )
        if self.streams < 1:
            raise ValueError(f"streams must be at least 1, not {streams}")
        for a, b in pairwise(self._names):
            if a == b:
                raise UserError(
                    f"shard {a} is listed twice", f"to read it more often, type repeat={{'{a}': 2}}"
                )
        text = json.dumps([shards, [int(count) for count in counts], self.seed, self.streams])
        self.digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
        self._passes: dict[int, _PassTable] = {}
        self._blocks: dict[tuple[int, int, int], np.ndarray] = {}

    def locate(self, n: int) -> tuple[int, str, int]:
        """Return the pass, the shard ("set/name") and the index in that shard of sample `n` (n ≥ 0).

        Takes O(log shards), after the first sample of a pass, for which the tables of the pass are drawn.
        """
        number, j, index = self._line_position(n)
        return number, self._names[self._copies[self._passes[number].order[j]]], index

    def replacements(self, n: int) -> Iterator[tuple[str, int]]:
        """Yield (shard, index) of the records that may replace sample `n` if its record is bad, in order.

        First the rest of its shard, wrapping around, then each shard that follows in its pass, wrapping around.
        """
        number, j, index = self._line_position(n)
        line = self._passes[number].order
        first = int(self._copies[line[j]])
        yield from (
            (self._names[first], i) for i in chain(range(index + 1, self._sizes[first]), range(index))
        )
        done = {first}
        for step in range(1, len(line)):
            shard = int(self._copies[line[(j + step) % len(line)]])
            if shard not in done:
                done.add(shard)
                yield from ((self._names[shard], i) for i in range(self._sizes[shard]))

    def _line_position(self, n: int) -> tuple[int, int, int]:
        """Return the pass of sample `n`, the place of its shard in the line, and the index in that shard."""
        if n < 0:
            raise ValueError(f"samples count from 0; there is no sample {n}")
        number, i = divmod(int(n), self.records)
        k, c = divmod(i, self.streams)
        table = self._pass_table(number)
        shuffled = self._shuffled_block(number, c, k // SHUFFLE_BLOCK)[k % SHUFFLE_BLOCK]
        x = int(table.begin[c]) + k - k % SHUFFLE_BLOCK + int(shuffled)
        j = bisect_right(table.first, x) - 1
        return number, j, x - int(table.first[j])

    def _pass_table(self, number: int) -> _PassTable:
        if number not in self._passes:
            order = permutation(len(self._copies), self.seed, _SHARDS, number)
            first = np.concatenate([[0], np.cumsum(self._sizes[self._copies[order]])])
            streams = permutation(
                self.streams, self.seed, _STREAMS, number
            )  # τ: which stream is t-th in the line
            quotient, extra = divmod(self.records, self.streams)
            lengths = quotient + (streams < extra)
            begin = np.empty(self.streams, np.int64)
            begin[streams] = np.cumsum(lengths) - lengths
            _cache_put(self._passes, number, _PassTable(order, first, begin), _CACHED_PASSES)
        return self._passes[number]

    def _shuffled_block(self, number: int, c: int, block: int) -> np.ndarray:
        key = (number, c, block)
        if key not in self._blocks:
            quotient, extra = divmod(self.records, self.streams)
            length = min(SHUFFLE_BLOCK, quotient + (c < extra) - block * SHUFFLE_BLOCK)
            shuffled = permutation(length, self.seed, _BLOCKS, number, c, block).astype(np.int16)
            _cache_put(self._blocks, key, shuffled, _CACHED_BLOCKS)
        return self._blocks[key]


def _repeat_counts(names: Sequence[str], repeat: dict[str, int]) -> list[int]:
    """Return how often each shard is read per pass; an entry for the shard overrides one for its set."""
    sets = {name.split("/")[0] for name in names}
    for name, count in repeat.items():
        if name not in sets and name not in names:
            raise ValueError(
                f"repeat names {name}, which is neither one of the sets {sorted(sets)} nor a shard"
            )
        if count != int(count) or count < 1:
            raise UserError(
                f"repeat of {name} must be a whole number from 1 up, not {count}", "or leave the set out"
            )
    return [int(repeat.get(name, repeat.get(name.split("/")[0], 1))) for name in names]


def _cache_put(cache: dict[K, V], key: K, value: V, limit: int) -> None:
    """Insert a value; evict the oldest one if the cache is full."""
    if len(cache) >= limit:
        del cache[next(iter(cache))]
    cache[key] = value


def micro_batch_numbers(q: int, *, rank: int, world: int, size: int) -> list[int]:
    """Return the sample numbers of micro-batch `q` (counted over the whole run) of a rank.

    With batch_size = world · size · accumulation, optimizer step s trains on exactly the samples from
    s · batch_size to (s + 1) · batch_size - 1, for any split into the three factors.
    """
    return [world * (q * size + i) + rank for i in range(size)]


class MicroBatchSampler:
    """An endless batch sampler: the sample numbers of each micro-batch of a rank. It has no length.

    Each iteration starts at micro-batch `start`, which is samples seen ÷ (world · size).
    """

    def __init__(self, *, rank: int, world: int, size: int, start: int = 0) -> None:
        """Store the arguments; the environment is not read."""
        if not (0 <= rank < world and size >= 1 and start >= 0):
            raise ValueError(f"invalid micro-batch: rank {rank} of {world}, size {size}, start {start}")
        self.rank, self.world, self.size, self.start = rank, world, size, start

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of `size` sample numbers, without end."""
        q = self.start
        while True:
            yield micro_batch_numbers(q, rank=self.rank, world=self.world, size=self.size)
            q += 1
