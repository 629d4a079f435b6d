import itertools
from collections import Counter

import numpy as np
import pytest

from ltx_titan.data import BatchPlan, DataPosition, resume_step

COST = {"short": 1.0, "middle": 3.0, "long": 10.0}


def make(shapes, global_batch_size, seed=0, fingerprint="data"):
    return BatchPlan(shapes, [COST[shape] for shape in shapes], seed, global_batch_size, fingerprint)


def mixed_shapes(count, seed):
    return np.random.Generator(np.random.PCG64(seed)).choice(sorted(COST), count).tolist()


POSITION = DataPosition(samples_seen=96, global_batch_size=8, fingerprint="a" * 32)
SIZES = list(itertools.product([1, 2, 3, 7, 24, 50], [1, 2, 4, 12]))
MESHES = [(dp, local) for dp in (1, 2, 4) for local in (1, 2, 3, 8)]


@pytest.mark.parametrize(("count", "size"), SIZES)
def test_every_epoch_has_every_sample_and_only_its_last_batch_is_filled_up(count, size):
    plan = make(mixed_shapes(count, count), size)
    epoch = plan.batches_per_epoch
    assert epoch == -(-count // size)
    for number in range(3):
        batches = [plan.global_batch(n) for n in range(number * epoch, (number + 1) * epoch)]
        assert all(len(batch) == size for batch in batches)
        seen = Counter(itertools.chain.from_iterable(batches))
        assert sorted(seen) == list(range(count))
        assert max(seen.values()) - min(seen.values()) <= 1


@pytest.mark.parametrize(("count", "size"), SIZES)
def test_global_batch_is_a_pure_function_of_its_number(count, size):
    shapes = mixed_shapes(count, count)
    expected = [make(shapes, size).global_batch(n) for n in range(10)]
    plan = make(shapes, size)
    assert [plan.global_batch(n) for n in reversed(range(10))] == expected[::-1]


def test_order_changes_with_epoch_seed_and_data():
    shapes = ["short"] * 40
    first = make(shapes, 4)
    orders = [
        [plan.global_batch(n) for n in range(start, start + 10)]
        for plan, start in (
            (first, 0),
            (first, 10),
            (make(shapes, 4, seed=1), 0),
            (make(shapes, 4, fingerprint="other"), 0),
        )
    ]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_order_equals_that_of_earlier_versions():
    # A run that resumes with a newer version must continue with the samples that it has not used.
    plan = make(["short", "long"] * 4, 4, seed=42)
    assert [plan.global_batch(n) for n in range(2)] == [(5, 3, 7, 1), (4, 0, 6, 2)]


def test_global_batches_have_one_shape_if_a_bucket_fills_them():
    shapes = mixed_shapes(50, 1)
    plan = make(shapes, 4)
    whole = sum(count // 4 for count in Counter(shapes).values())
    positions = set()
    for epoch in range(4):
        batches = [plan.global_batch(epoch * plan.batches_per_epoch + n) for n in range(plan.batches_per_epoch)]
        mixed = [n for n, batch in enumerate(batches) if len({shapes[i] for i in batch}) > 1]
        assert len(batches) - len(mixed) >= whole
        positions.add(tuple(mixed))
    assert len(positions) > 1, "mixed batches are at shuffled positions"


@pytest.mark.parametrize(("dp_size", "local"), MESHES)
def test_ranks_share_each_global_batch_without_overlap_and_in_equal_numbers(dp_size, local):
    shapes = mixed_shapes(30, 5)
    plan = make(shapes, 12)
    for n in range(6):
        ranks = [plan.micro_batches(n, rank, dp_size, local) for rank in range(dp_size)]
        assert len({len(forwards) for forwards in ranks}) == 1, "every rank runs as many forwards"
        assert {sum(len(forward) for forward in forwards) for forwards in ranks} == {12 // dp_size}
        pairs = sorted(pair for forwards in ranks for forward in forwards for pair in forward)
        assert pairs == list(enumerate(plan.global_batch(n))), "positions do not depend on the mesh"
        for forward in itertools.chain.from_iterable(ranks):
            assert 1 <= len(forward) <= local
            assert len({shapes[index] for _, index in forward}) == 1


def test_equal_samples_make_full_forwards():
    plan = make(["short"] * 24, 12)
    for rank in range(2):
        assert [len(forward) for forward in plan.micro_batches(0, rank, 2, 3)] == [3, 3]


@pytest.mark.parametrize("seed", range(5))
def test_mixed_batches_balance_the_cost_of_ranks(seed):
    shapes = mixed_shapes(16, seed)
    plan = make(shapes, 16)
    loads = [
        sum(COST[shapes[index]] for forward in plan.micro_batches(0, rank, 4, 1) for _, index in forward)
        for rank in range(4)
    ]
    assert max(loads) - min(loads) <= COST["long"]
    naive = [sum(COST[shapes[index]] for index in plan.global_batch(0)[rank * 4 : rank * 4 + 4]) for rank in range(4)]
    assert max(loads) <= max(naive)


def test_expensive_forwards_run_at_the_same_time_on_all_ranks():
    shapes = ["long"] * 4 + ["short"] * 12
    plan = make(shapes, 16)
    for rank in range(4):
        first, *others = plan.micro_batches(0, rank, 4, 1)
        assert shapes[first[0][1]] == "long"
        assert {shapes[forward[0][1]] for forward in others} == {"short"}


def test_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="found none"):
        make([], 1)


def test_position_round_trips_through_plain_values():
    assert DataPosition.from_dict(POSITION.to_dict()) == POSITION


def test_unchanged_job_resumes_at_the_next_batch():
    assert resume_step(POSITION, global_batch_size=8, fingerprint="a" * 32) == (12, [])


def test_changed_batch_size_keeps_the_sample_count_and_is_reported():
    batch, (note,) = resume_step(POSITION, global_batch_size=32, fingerprint="a" * 32)
    assert batch == 3
    assert "from 8 to 32" in note
    assert "again" not in note
    batch, (note,) = resume_step(POSITION, global_batch_size=10, fingerprint="a" * 32)
    assert batch == 9
    assert "6 of them are used again" in note


def test_changed_data_is_reported():
    batch, (note,) = resume_step(POSITION, global_batch_size=8, fingerprint="b" * 32)
    assert batch == 12
    assert "aaaaaaaa -> bbbbbbbb" in note
