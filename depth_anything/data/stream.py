"""The order of training samples as arithmetic: which record is sample n, and which samples a rank draws.

Nothing here reads data or remembers a position. The order depends on the shards, the seed and the number of
streams alone, so a run continues from one integer on any number of devices and workers.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

SHUFFLE_BLOCK = 256  # records of a stream that are shuffled among themselves
_CACHED_BLOCKS = 8192  # 0.5 KiB each; neighbouring samples use as many blocks as there are streams
_CACHED_PASSES = 2  # micro-batches may straddle the end of a pass

# What a draw is for. Two purposes never share a Philox word; the numbers are part of the order, so they stay.
_SHARDS, _STREAMS, _BLOCKS = 1, 2, 3
CROP, PERTURBATION, CUTMIX = 16, 17, 18


def _philox_words(count: int, seed: int, purpose: int, *place: int) -> np.ndarray:
    """Return `count` raw Philox words (uint64) of seed, purpose and up to three integers of place.

    Raw words are the part of NumPy's generators that its versions promise to keep.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed is an integer from 0 to 2**64 - 1, not {seed}")
    counter = np.zeros(4, np.uint64)  # its lowest word counts up while drawing; the others tell places apart
    counter[1 : 1 + len(place)] = place
    return np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=counter).random_raw(count)


def permutation(length: int, seed: int, purpose: int, *place: int) -> np.ndarray:
    """Return a permutation of range(length), int64: the stable argsort of the other numbers' words."""
    return np.argsort(_philox_words(length, seed, purpose, *place), kind="stable")


def random_uint64(seed: int, n: int, count: int, *, purpose: int = 0) -> np.ndarray:
    """Return the `count` uint64 words that belong to sample `n`, another set of them for each purpose."""
    return _philox_words(count, seed, purpose, n)


def random_uniform(seed: int, n: int, count: int, *, purpose: int = 0) -> np.ndarray:
    """Return `count` float64 in [0, 1) that belong to sample `n`, another set of them for each purpose."""
    return (random_uint64(seed, n, count, purpose=purpose) >> np.uint64(11)) * 2.0**-53


class _PassTable(NamedTuple):
    """One pass: shards end to end on a line, and the streams cut from it."""

    order: np.ndarray  # which copy of a shard lies j-th on the line (π)
    first: np.ndarray  # where it begins, and the line's length last (F)
    begin: np.ndarray  # where each stream begins (S)


class Stream:
    """The endless order of training samples over the shards of all sets.

    Each pass lays the shards end to end in an order of its own and cuts that line into `streams` pieces of
    equal length (to one record) which are read side by side, each shuffled within blocks of 256. So every
    record comes exactly once a pass, and neighbours come from far apart.

    Attributes:
        records: samples in a pass.
        streams: pieces read side by side; fixed for the life of a run.
        seed: what all orders are drawn from.
        digest: "sha256:…" of all that fixes the order.
    """

    def __init__(
        self,
        shards: Iterable[tuple[str, int]],
        *,
        seed: int,
        streams: int,
        repeat: Mapping[str, int] | None = None,
    ) -> None:
        """Lay out the shards; their order of arrival does not matter.

        Args:
            shards: ("set/name", records) of each shard.
            seed: from 0 to 2**64 - 1.
            streams: at least 1; may exceed the records.
            repeat: times a pass that a shard ("set/name") or all of a set's ("set") come; 1 where unnamed.

        Raises:
            ValueError: there is nothing to read, a shard comes twice, or a number is out of range.
        """
        shards = sorted((str(name), int(records)) for name, records in shards)
        times = _repeat_counts([name for name, _ in shards], dict(repeat or {}))
        self.seed, self.streams = int(seed), int(streams)
        self._names = [name for name, _ in shards]
        self._sizes = np.array([records for _, records in shards], np.int64)
        self._copies = np.repeat(np.arange(len(shards)), times)  # a repeated shard stands there several times
        self.records = int(self._sizes[self._copies].sum())
        if self.records == 0:
            raise ValueError(
                f"there are no records to train on: {len(shards)} shards hold none; name a set that has some"
            )
        if self.streams < 1:
            raise ValueError(f"streams is at least 1, not {streams}")
        for (a, _), (b, _) in zip(shards, shards[1:], strict=False):
            if a == b:
                raise ValueError(f"shard {a} is named twice; to read it more often, give repeat={{'{a}': 2}}")
        text = json.dumps([shards, [int(t) for t in times], self.seed, self.streams])
        self.digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
        self._passes: dict[int, _PassTable] = {}
        self._blocks: dict[tuple[int, int, int], np.ndarray] = {}

    def locate(self, n: int) -> tuple[int, str, int]:
        """Return the pass, the shard ("set/name") and the index within it of sample `n`, 0 ≤ n.

        Takes O(log shards); the tables of a pass are drawn when its first sample is asked for.
        """
        number, j, index = self._find(n)
        return number, self._names[self._shard(number, j)], index

    def replacements(self, n: int) -> Iterator[tuple[str, int]]:
        """Yield, in order, the (shard, index) that may take the place of sample `n`'s unreadable record.

        First the rest of its shard, wrapping, then the shards that follow in its pass, wrapping, each once.
        """
        number, j, index = self._find(n)
        own = self._shard(number, j)
        size = int(self._sizes[own])
        yield from ((self._names[own], i) for i in chain(range(index + 1, size), range(index)))
        seen = {own}
        for step in range(1, len(self._copies)):
            shard = self._shard(number, (j + step) % len(self._copies))
            if shard not in seen:
                seen.add(shard)
                yield from ((self._names[shard], i) for i in range(int(self._sizes[shard])))

    def _find(self, n: int) -> tuple[int, int, int]:
        """Return pass, place on the line and index within the shard there of sample `n`."""
        if n < 0:
            raise ValueError(f"samples count from 0; there is no sample {n}")
        number, i = divmod(int(n), self.records)
        k, c = divmod(i, self.streams)
        table = self._pass(number)
        x = (
            int(table.begin[c])
            + k
            - k % SHUFFLE_BLOCK
            + int(self._block(number, c, k // SHUFFLE_BLOCK)[k % SHUFFLE_BLOCK])
        )
        j = bisect_right(table.first, x) - 1
        return number, j, x - int(table.first[j])

    def _shard(self, number: int, j: int) -> int:
        return int(self._copies[self._pass(number).order[j]])

    def _pass(self, number: int) -> _PassTable:
        if number not in self._passes:
            order = permutation(len(self._copies), self.seed, _SHARDS, number)
            first = np.concatenate([[0], np.cumsum(self._sizes[self._copies[order]])])
            laid = permutation(self.streams, self.seed, _STREAMS, number)  # τ: the stream that lies t-th
            quotient, extra = divmod(self.records, self.streams)
            lengths = quotient + (laid < extra)
            begin = np.empty(self.streams, np.int64)
            begin[laid] = np.cumsum(lengths) - lengths
            _cache_put(self._passes, number, _PassTable(order, first, begin), _CACHED_PASSES)
        return self._passes[number]

    def _block(self, number: int, c: int, block: int) -> np.ndarray:
        key = (number, c, block)
        if key not in self._blocks:
            quotient, extra = divmod(self.records, self.streams)
            length = min(SHUFFLE_BLOCK, quotient + (c < extra) - block * SHUFFLE_BLOCK)
            shuffled = permutation(length, self.seed, _BLOCKS, number, c, block).astype(np.int16)
            _cache_put(self._blocks, key, shuffled, _CACHED_BLOCKS)
        return self._blocks[key]


def _repeat_counts(names: Sequence[str], repeat: dict[str, int]) -> list[int]:
    """Return how often each shard comes; its own entry in `repeat` counts before its set's."""
    sets = {name.split("/")[0] for name in names}
    for name, times in repeat.items():
        if name not in sets and name not in names:
            raise ValueError(
                f"repeat names {name}, which is none of the sets {sorted(sets)} nor a shard of them"
            )
        if times != int(times) or times < 1:
            raise ValueError(
                f"repeat of {name} is a whole number from 1 up, not {times}; leave the set out instead"
            )
    return [int(repeat.get(name, repeat.get(name.split("/")[0], 1))) for name in names]


def _cache_put(cache: dict, key: object, value: object, limit: int) -> None:
    """Put `value` into `cache`, dropping the oldest entry when it is full."""
    if len(cache) >= limit:
        del cache[next(iter(cache))]
    cache[key] = value


def micro_batch_numbers(q: int, *, rank: int, world: int, size: int) -> list[int]:
    """Return the sample numbers of rank `rank`'s micro-batch `q`, counted over the whole run.

    With batch_size = world · size · accumulation, optimizer step s is exactly the samples from s · batch_size
    up to (s + 1) · batch_size, however the three factors share it.
    """
    return [world * (q * size + i) + rank for i in range(size)]


class MicroBatchSampler:
    """An endless batch sampler: the sample numbers of one rank's micro-batches. It has no length.

    Each iteration begins anew at `start`, the index of the first micro-batch: samples seen ÷ (world · size).
    """

    def __init__(self, *, rank: int, world: int, size: int, start: int = 0) -> None:
        """Take the rank's place explicitly; nothing is read from the environment."""
        if not (0 <= rank < world and size >= 1 and start >= 0):
            raise ValueError(f"no micro-batch for rank {rank} of {world}, size {size}, start {start}")
        self.rank, self.world, self.size, self.start = rank, world, size, start

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of `size` sample numbers, without end."""
        q = self.start
        while True:
            yield micro_batch_numbers(q, rank=self.rank, world=self.world, size=self.size)
            q += 1
