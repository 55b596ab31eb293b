import hashlib
import itertools
import pickle
from collections import Counter

import numpy as np
import pytest

from depth_anything.data import stream as stream_module
from depth_anything.data.stream import (
    CROP,
    MicroBatchSampler,
    Stream,
    micro_batch_numbers,
    permutation,
    random_uint64,
    random_uniform,
)

SHARDS = [("b/1", 700), ("a/0", 530), ("a/1", 1), ("a/2", 0), ("c/x-7", 1311)]
GOLDEN_WORDS = [213000021201967259, 4455796210202625458]
GOLDEN_PERMUTATION = "ab4e3e0dce2805c9"
GOLDEN_ORDER = "9fd8c23ff1086acb"
GOLDEN_DIGEST = "sha256:67d73d8aeeb6649b0dc6166e3db96de3130782d659aec964c9cfc8e8b32e9269"


def philox(key, counter, count):
    """Philox 4x64 with ten rounds in plain integers (Salmon et al., 2011); NumPy increments the counter first."""
    out, mask = [], 2**64 - 1
    while len(out) < count:
        counter = [counter[0] + 1, *counter[1:]]
        c, k = list(counter), list(key)
        for turn in range(10):
            if turn:
                k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
            a, b = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
            c = [(b >> 64) ^ c[1] ^ k[0], b & mask, (a >> 64) ^ c[3] ^ k[1], a & mask]
        out += c
    return out[:count]


def plain_pass(shards, seed, streams, number):
    """One pass with plain code: shards in a line, cut into pieces, shuffled in blocks, read in turn."""
    names = sorted(shards)
    line = []
    for s in permutation(len(names), seed, 1, number):
        line += [(names[s][0], i) for i in range(names[s][1])]
    q, e = divmod(len(line), streams)
    pieces = {}
    for c in permutation(streams, seed, 2, number).tolist():
        length = q + (c < e)
        piece, line = line[:length], line[length:]
        pieces[c] = []
        for block in range(-(-length // 256)):
            part = piece[256 * block : 256 * block + 256]
            pieces[c] += [part[i] for i in permutation(len(part), seed, 3, number, c, block)]
    assert not line
    rounds = itertools.zip_longest(*(pieces[c] for c in range(streams)))
    return [record for turn in rounds for record in turn if record is not None]


def digest(values):
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def test_random_words_are_philox():
    assert random_uint64(7, 12345678901, 9, purpose=CROP).tolist() == philox(
        [7, CROP], [0, 12345678901, 0, 0], 9
    )
    expected = np.argsort(philox([2**64 - 1, 3], [0, 4, 5, 6], 300), kind="stable")
    assert permutation(300, 2**64 - 1, 3, 4, 5, 6).tolist() == expected.tolist()


def test_golden():
    """Golden values: the order of every existing run depends on them, so they must never change."""
    assert random_uint64(0, 0, 2).tolist() == GOLDEN_WORDS
    assert digest(permutation(1000, 1, 2, 3, 4, 5).tolist()) == GOLDEN_PERMUTATION
    s = Stream(SHARDS, seed=3, streams=24)
    assert digest([s.locate(n) for n in range(3 * s.records)]) == GOLDEN_ORDER
    assert s.digest == GOLDEN_DIGEST


@pytest.mark.parametrize("streams", [1, 2, 7, 24, 512, 2541, 2542, 2543, 9000])
def test_order_equals_a_plain_implementation(streams):
    s = Stream(SHARDS, seed=5, streams=streams)
    assert s.records == 2542
    for number in (0, 1, 4):
        got = [s.locate(n) for n in range(number * s.records, (number + 1) * s.records)]
        assert [p for p, _, _ in got] == [number] * s.records
        assert [record for _, *record in got] == [list(r) for r in plain_pass(SHARDS, 5, streams, number)]


def test_each_pass_reads_each_record_once_in_a_new_order():
    s = Stream(SHARDS, seed=1, streams=16)
    passes = [[s.locate(n)[1:] for n in range(p * s.records, (p + 1) * s.records)] for p in range(3)]
    everything = sorted((name, i) for name, size in SHARDS for i in range(size))
    for order in passes:
        assert sorted(order) == everything
    assert passes[0] != passes[1] != passes[2]
    assert passes[0] != [Stream(SHARDS, seed=2, streams=16).locate(n)[1:] for n in range(s.records)]


def test_neighboring_samples_are_far_apart_in_the_line():
    s = Stream([(f"a/{i:03d}", 100) for i in range(200)], seed=0, streams=64)
    batch = [s.locate(n)[1] for n in range(6400, 6408)]
    assert len(set(batch)) == 8
    apart = np.abs(np.diff(s._pass_table(0).begin))  # τ: streams c and c + 1 are not neighbors in the line
    assert np.median(apart) > 10 * s.records / 64


def test_repeat_reads_shards_several_times():
    s = Stream(SHARDS, seed=1, streams=16, repeat={"a": 2, "a/0": 3})
    assert s.records == 700 + 3 * 530 + 2 * 1 + 1311
    seen = Counter(s.locate(n)[1:] for n in range(s.records))
    assert {name: {seen[name, i] for i in range(size)} for name, size in SHARDS if size} == {
        "a/0": {3},
        "a/1": {2},
        "b/1": {1},
        "c/x-7": {1},
    }


def test_order_does_not_depend_on_argument_order_or_earlier_calls():
    s = Stream(SHARDS, seed=9, streams=10)
    shuffled = Stream(reversed(SHARDS), seed=9, streams=10)
    copy = pickle.loads(pickle.dumps(s))
    numbers = np.random.default_rng(0).permutation(4 * s.records)[:500]
    expected = [s.locate(n) for n in numbers]
    assert [shuffled.locate(n) for n in reversed(numbers)] == expected[::-1]
    assert [copy.locate(n) for n in numbers] == expected
    assert shuffled.digest == s.digest
    others = [
        Stream(SHARDS, seed=8, streams=10),
        Stream(SHARDS, seed=9, streams=11),
        Stream(SHARDS, seed=9, streams=10, repeat={"b": 2}),
        Stream([*SHARDS[:-1], ("c/x-7", 1312)], seed=9, streams=10),
    ]
    assert len({s.digest, *(other.digest for other in others)}) == 5


def test_locate_returns_python_types():
    found = Stream(SHARDS, seed=9, streams=10).locate(np.int64(4321))
    assert [type(part) for part in found] == [int, str, int]


def test_sixty_thousand_shards(monkeypatch):
    drawn = []
    original = stream_module._philox_words
    monkeypatch.setattr(
        stream_module, "_philox_words", lambda count, *key: drawn.append(count) or original(count, *key)
    )
    s = Stream([(f"set/{i:06d}", 1000) for i in range(60_000)], seed=0, streams=1536)
    number, name, index = s.locate(90_000_000)
    assert number == 1 and name.startswith("set/") and 0 <= index < 1000
    assert sorted(drawn) == [256, 1536, 60_000]  # no table grows with the number of records
    assert all(isinstance(table, np.ndarray) for table in s._pass_table(1))
    for n in range(90_000_000, 90_000_000 + 4 * 1536):
        s.locate(n)
    assert len(drawn) == 2 + 1536  # tables are cached, one block per stream


def test_caches_are_bounded(monkeypatch):
    monkeypatch.setattr(stream_module, "_CACHED_BLOCKS", 5)
    s = Stream(SHARDS, seed=5, streams=24)
    got = [s.locate(n)[1:] for n in range(4 * s.records)]
    assert got[: s.records] == plain_pass(SHARDS, 5, 24, 0)
    assert got[3 * s.records :] == plain_pass(SHARDS, 5, 24, 3)
    assert len(s._blocks) == 5 and len(s._passes) == 2


def test_replacements_are_the_rest_of_the_pass():
    s = Stream(SHARDS, seed=5, streams=24, repeat={"b": 3})
    for n in (0, 999, 2 * s.records + 17):
        number, name, index = s.locate(n)
        tour = list(s.replacements(n))
        size = dict(SHARDS)[name]
        assert tour[: size - 1] == [(name, i % size) for i in range(index + 1, index + size)]
        everything = {(shard, i) for shard, count in SHARDS for i in range(count)}
        assert len(tour) == len(everything) - 1 and {*tour, (name, index)} == everything
        shards = [shard for shard, _ in itertools.groupby(tour, key=lambda place: place[0])]
        line = [s._names[s._copies[k]] for k in s._pass_table(number).order]
        j = s._line_position(n)[1]
        after = dict.fromkeys(shard for shard in line[j:] + line[:j] if dict(SHARDS)[shard])
        assert shards == [shard for shard in after if shard != name or size > 1]


def test_steps_train_on_the_same_samples_for_every_layout():
    batch = 24
    layouts = [(r, b, batch // (r * b)) for r in range(1, 25) for b in range(1, 25) if batch % (r * b) == 0]
    assert len(layouts) > 20
    for world, size, accumulation in layouts:
        for step in (0, 1, 7):
            numbers = [
                n
                for q in range(step * accumulation, (step + 1) * accumulation)
                for rank in range(world)
                for n in micro_batch_numbers(q, rank=rank, world=world, size=size)
            ]
            assert sorted(numbers) == list(range(step * batch, (step + 1) * batch))
    assert micro_batch_numbers(3, rank=1, world=4, size=2) == [25, 29]


def test_micro_batches_are_endless_and_start_anywhere():
    batches = MicroBatchSampler(rank=1, world=2, size=3)
    first = list(itertools.islice(batches, 6))
    assert first[0] == [1, 3, 5] and first[1] == [7, 9, 11]
    assert list(itertools.islice(MicroBatchSampler(rank=1, world=2, size=3, start=4), 2)) == first[4:]
    assert list(itertools.islice(batches, 6)) == first  # each iteration starts again
    assert not hasattr(batches, "__len__")


def test_uniform():
    u = np.concatenate([random_uniform(0, n, 50) for n in range(400)])
    assert u.dtype == np.float64 and u.min() >= 0 and u.max() < 1
    assert np.allclose(np.histogram(u, 10, (0, 1))[0] / u.size, 0.1, atol=0.01)
    expected = [(word >> 11) / 2**53 for word in philox([3, CROP], [0, 8, 0, 0], 4)]
    assert random_uniform(3, 8, 4, purpose=CROP).tolist() == expected
    keys = [(3, 8, CROP), (3, 9, CROP), (4, 8, CROP), (3, 8, 0)]
    assert len({random_uniform(seed, n, 1, purpose=purpose)[0] for seed, n, purpose in keys}) == 4


@pytest.mark.parametrize(
    ("shards", "options", "message"),
    [
        ([], {}, " records"),
        ([("a/0", 0)], {}, " records"),
        ([("a/0", 1), ("a/0", 1)], {}, "a/0 .*repeat="),
        ([("a/0", 1)], {"streams": 0}, "streams.* 0"),
        ([("a/0", 1)], {"repeat": {"b": 2}}, "repeat names b"),
        ([("a/0", 1)], {"repeat": {"a": 0}}, "repeat of a .* 0"),
        ([("a/0", 1)], {"repeat": {"a": 1.5}}, r"repeat of a .* 1\.5"),
        ([("a/0", 1)], {"seed": -1}, "-1"),
    ],
)
def test_invalid_arguments(shards, options, message):
    with pytest.raises(ValueError, match=message):
        Stream(shards, **{"seed": 0, "streams": 4, **options}).locate(0)


def test_negative_samples_and_ranks_are_refused():
    with pytest.raises(ValueError, match="-1"):
        Stream(SHARDS, seed=0, streams=4).locate(-1)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        MicroBatchSampler(rank=2, world=2, size=1)
