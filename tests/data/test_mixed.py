"""Several sources in one job: their shares, epochs, order and placeholders."""

import itertools
from collections import Counter
from fractions import Fraction

import pytest

from ltx_titan.data import (
    BatchPlan,
    MixedDataset,
    Mixture,
    PrecomputedDataset,
    Source,
    StepLoader,
    collate,
    shape_key_of,
)
from tests.data.files import AV_SOURCES, write_dataset

SIZES = (300, 700)


def plan_of(draws, size=8, sizes=SIZES, shapes=None):
    mixture = Mixture(sizes, tuple(map(Fraction, draws)))
    return BatchPlan(shapes or ["one"] * sum(sizes), [1.0] * sum(sizes), 3, size, "data", mixture)


def samples_of(plan, first, last):
    return list(itertools.chain.from_iterable(plan.global_batch(n) for n in range(first, last)))


def test_sources_are_drawn_by_their_weights_and_their_samples_equally_often():
    # 3 : 1, the larger source less often.
    plan = plan_of((750, 250))
    epoch = plan.batches_per_epoch
    assert epoch == 125
    for number in range(6):
        found = samples_of(plan, number * epoch, (number + 1) * epoch)
        assert sum(index < 300 for index in found) == pytest.approx(750, abs=1)
    # Epochs of a source continue where the last one ended: no sample is used twice before the others once.
    counts = Counter(samples_of(plan, 0, 3 * epoch))
    assert {counts[index] for index in range(300)} == {7, 8}
    assert {counts[index] for index in range(300, 1000)} == {1, 2}


def test_repeats_give_every_sample_that_often_in_an_epoch():
    counts = Counter(samples_of(plan_of((900, 700)), 0, 200))
    assert {counts[index] for index in range(300)} == {3}
    assert {counts[index] for index in range(300, 1000)} == {1}


def test_shares_are_kept_whatever_the_batch_size_and_the_smallest_source():
    plan = plan_of((Fraction(20, 3), Fraction(7, 3), 1), size=7, sizes=(2, 7, 1))
    for n in (1, 2, 3, 50, 300):
        assert plan.drawn(n) == pytest.approx([7 * n * share for share in (2 / 3, 7 / 30, 1 / 10)], abs=7)
    assert plan.drawn(300) == [1400, 490, 210]


def test_what_was_drawn_is_counted_at_every_batch():
    shapes = ["one", "two"] * 500
    plan = plan_of((600, 400), size=12, shapes=shapes)
    for n in (0, 1, 50, plan.batches_per_epoch, plan.batches_per_epoch + 7):
        first = sum(index < 300 for index in samples_of(plan, 0, n))
        assert plan.drawn(n) == [first, 12 * n - first]


def test_the_order_is_shuffled_and_a_function_of_the_batch_alone():
    plan, again = plan_of((750, 250)), plan_of((750, 250))
    assert [again.global_batch(n) for n in (130, 4)] == [plan.global_batch(n) for n in (130, 4)]
    assert len({sum(index < 300 for index in plan.global_batch(n)) for n in range(125)}) > 2
    ranks = [[pair for f in plan.micro_batches(9, rank, 4, 1) for pair in f] for rank in range(4)]
    assert sorted(itertools.chain(*ranks)) == list(enumerate(plan.global_batch(9)))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two sources: 'clips' with audio, 'silent' without."""
    folder = tmp_path_factory.mktemp("mixed")
    write_dataset(folder / "clips", "abcd")
    write_dataset(folder / "silent", "xyz", folders=("conditions", "latents"))
    return folder


def mixed(root, clips=(None, 1), silent=(None, 1), **fields):
    video = {folder: key for folder, key in AV_SOURCES.items() if key != "audio_latents"}
    return MixedDataset(
        [
            Source("clips", PrecomputedDataset(root / "clips", AV_SOURCES), *clips),
            Source("silent", PrecomputedDataset(root / "silent", video), *silent, absent=("audio",), **fields),
        ]
    )


def test_a_source_without_a_stream_gets_a_placeholder_that_is_absent(root):
    dataset = mixed(root)
    assert [dataset.name(index) for index in (0, 3, 4, 6)] == [
        "clips: a.pt",
        "clips: d.pt",
        "silent: x.pt",
        "silent: z.pt",
    ]
    assert dataset.parts == [range(4), range(4, 7)]
    for index in range(7):
        assert shape_key_of(dataset.load(index)) == dataset.shape_key(index)
    batch = collate([dataset.load(4), dataset.load(5)])
    assert batch["audio_latents"]["latents"].shape == (2, 8, 1, 16)
    assert not batch["audio_latents"]["present"].any()
    assert dataset.peek(4)["audio_latents"]["present"] is False
    assert "present" not in dataset.load(0)["audio_latents"]
    assert dataset.source_of(5).name == "silent"


def test_a_resumed_run_reads_the_samples_of_an_unbroken_one(root):
    dataset = mixed(root, clips=(3.0, 1), silent=(1.0, 1))
    keys = [dataset.shape_key(index) for index in range(len(dataset))]
    plan = BatchPlan(keys, [1.0] * 7, 0, 4, dataset.fingerprint, dataset.mixture)

    def read(first):
        with StepLoader(dataset, plan, start_step=first, stop_step=6, local_batch_size=2) as loader:
            return [[f.samples for f in step.micro_batches] for step in loader]

    assert plan.batches_per_epoch == 2
    whole = read(0)
    assert read(3) == whole[3:]  # in the middle of the second epoch
    assert sum(index < 4 for index in itertools.chain(*itertools.chain(*whole))) == 18


def test_the_fingerprint_is_that_of_the_order(root):
    made = [
        mixed(root),
        mixed(root),
        mixed(root, silent=(None, 2)),
        mixed(root, (3.0, 1), (1.0, 1)),
        mixed(root, group=1),
    ]
    first, same, *others = [dataset.fingerprint for dataset in made]
    assert first == same
    assert len({first, *others}) == 4


def test_a_source_that_an_epoch_never_has_is_refused(root):
    with pytest.raises(ValueError, match=r"silent has weight 0\.1: expected at least one .* epoch of 7, found 0\.069"):
        mixed(root, (10.0, 1), (0.1, 1))
