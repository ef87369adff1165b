"""Paired comparisons: intervals against closed forms, flips and means against brute force, refusals by name."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from kvlab.lab.ceilings import Ceilings, is_full
from kvlab.lab.compare import MEAN, Scored, compare, interval, resampled
from kvlab.lab.record import Examples
from kvlab.schema import ConfigError
from kvlab.tasks.metrics import ACCURACY, METRICS, PERPLEXITY, ExampleScores
from tests.lab.test_results import record


def single(right) -> ExampleScores:
    """Examples of one label each."""
    right = np.asarray(right, bool)
    ones = np.ones((len(right), 1))
    return ExampleScores(
        nll=ones, correct=right[:, None] * 1.0, weight=ones, num_labels=ones.astype(np.int32), right=right
    )


def many(seed, num_examples=9, num_turns=2, quality=0.6) -> ExampleScores:
    """Examples of several labels in several turns; the first example has none in the second turn."""
    num_labels = np.random.default_rng(0).integers(1, 5, (num_examples, num_turns)).astype(np.int32)
    num_labels[0, 1:] = 0
    rng = np.random.default_rng(seed)
    right = rng.random(num_labels.sum()) < quality
    owner = np.repeat(np.arange(num_labels.size), num_labels.ravel())
    correct = np.bincount(owner, right, num_labels.size).reshape(num_labels.shape)
    nll = rng.random(num_labels.shape) * num_labels
    return ExampleScores(nll=nll, correct=correct, weight=num_labels * 1.0, num_labels=num_labels, right=right)


def run(variant, seed, examples, *, metric="accuracy", format="model", data="data", weights="w", **config) -> Scored:
    """A run whose record says what its examples sum to."""
    sums = {name: METRICS[metric].from_sums(each.sums()) for name, each in examples.items()}
    value = float(np.mean(list(sums.values())))
    made = record(variant, seed, value, metric=metric, memory={"format": format}, **config)
    turns = {name: METRICS[metric].by_turn(each) for name, each in examples.items() if each.num_turns > 1}
    verified = {"model": "the parallel form"}.get(format, f"rounded to {format}")
    made = replace(
        made,
        run_id=f"{variant}{format}{seed}",
        quality=replace(made.quality, slices=sums, turns=turns, verified_by=verified, chance=0.01),
        examples=Examples(sha256="x", data_sha256={name: f"{data}{seed}{name}" for name in examples}),
        training=replace(made.training, params_sha256=f"{weights}{seed}"),
    )
    return Scored(made, examples)


def compared(first, second, **options):
    ceilings = Ceilings([each.record for each in (*first, *second)])
    return compare(first, second, names=("A", "B"), ceilings=ceilings, **options)


# Intervals against closed forms.


@pytest.mark.parametrize("num_right", [3, 120, 200])
def test_the_interval_of_a_share_is_the_binomials(num_right):
    """From nothing right to k of N: a resample counts as a binomial does."""
    num = 240
    first, second = run("a", 0, {"s": single([False] * num)}), run("b", 0, {"s": single(np.arange(num) < num_right)})
    (cell,) = compared([first], [second]).cells
    expected = stats.binom.ppf([0.025, 0.975], num, num_right / num) / num
    assert cell.difference == num_right / num
    np.testing.assert_allclose([cell.low, cell.high], expected, atol=1.01 / num)


def test_the_interval_of_a_paired_difference_is_the_normal_one():
    """Of many examples: the mean, plus or minus 1.96 standard deviations of the *differences* over sqrt(N)."""
    rng = np.random.default_rng(1)
    before = rng.random(900) < 0.7
    after = np.where(rng.random(900) < 0.06, ~before, before)
    difference = after.astype(float) - before
    half = stats.norm.ppf(0.975) * difference.std() / np.sqrt(900)
    (cell,) = compared([run("a", 0, {"s": single(before)})], [run("b", 0, {"s": single(after)})]).cells
    np.testing.assert_allclose([cell.low, cell.high], difference.mean() + np.array([-half, half]), atol=0.06 * half)
    unpaired = stats.norm.ppf(0.975) * np.sqrt((before.var() + after.var()) / 900)
    assert cell.high - cell.low < unpaired  # half of what two separate intervals would say, or less


def test_seeds_are_drawn_before_their_examples():
    """Var = (variance of the seeds' means + mean over seeds of the variance within / N) / seeds."""
    rng, pairs = np.random.default_rng(2), []
    for seed, share in enumerate((0.1, 0.3, 0.8)):
        before, after = np.zeros(50, bool), rng.random(50) < share
        pairs.append((run("a", seed, {"s": single(before)}), run("b", seed, {"s": single(after)})))
    means = np.array([pair[1].examples["s"].right.mean() for pair in pairs])
    within = np.array([pair[1].examples["s"].right.var() / 50 for pair in pairs])
    (drawn,) = resampled(pairs, ACCURACY, 40_000, np.random.default_rng(3)).values()
    assert drawn.mean() == pytest.approx(means.mean(), abs=0.005)
    assert drawn.var() == pytest.approx((means.var() + within.mean()) / 3, rel=0.04)


def test_a_resample_is_the_metric_of_the_drawn_sums():
    """Perplexity of slices and turns, against a plain loop over drawn examples."""
    first = run("a", 0, {"x": many(1), "y": many(2)}, metric="perplexity")
    second = run("b", 0, {"x": many(3), "y": many(4)}, metric="perplexity")
    drawn = resampled([(first, second)], PERPLEXITY, 20_000, np.random.default_rng(0))
    assert list(drawn) == [(name, turn) for name in (MEAN, "x", "y") for turn in (None, 1, 2)]
    rng, looped = np.random.default_rng(9), {place: [] for place in drawn}
    for _ in range(4000):
        rows = {name: rng.integers(0, 9, 9) for name in "xy"}
        for (name, turn), values in looped.items():
            found = []
            for part in "xy" if name == MEAN else name:
                chosen = slice(None) if turn is None else slice(turn - 1, turn)
                sums = [
                    [getattr(each.examples[part], kind)[rows[part], chosen].sum() for kind in ("nll", "weight")]
                    for each in (first, second)
                ]
                found.append(np.exp(sums[1][0] / sums[1][1]) - np.exp(sums[0][0] / sums[0][1]))
            values.append(np.mean(found))
    for place, values in looped.items():
        scale = np.std(values)
        assert np.mean(values) == pytest.approx(drawn[place].mean(), abs=0.08 * scale), place
        assert scale == pytest.approx(drawn[place].std(), rel=0.06), place
        np.testing.assert_allclose(interval(drawn[place]), np.quantile(values, [0.025, 0.975]), atol=0.2 * scale)


def test_the_same_seed_gives_the_same_interval():
    sides = [[run(name, 0, {"s": many(index)})] for index, name in enumerate("ab")]
    ours, again, other = (compared(*sides, seed=seed, num_resamples=500) for seed in (0, 0, 1))
    assert ours == again != other


def test_a_run_differs_from_itself_by_nothing():
    ours = [run("a", seed, {"x": many(seed), "y": many(5)}) for seed in (0, 1)]
    for cell in compared(ours, ours, num_resamples=200).cells:
        assert (cell.difference, cell.low, cell.high, cell.flips.lost, cell.flips.won) == (0, 0, 0, 0, 0)


# Values and flips against brute force.


def test_values_and_flips_are_what_a_loop_over_labels_counts():
    first = [run("a", seed, {"x": many(seed), "y": many(seed + 10)}) for seed in (0, 1)]
    second = [run("b", seed, {"x": many(seed + 20), "y": many(seed + 30)}) for seed in (0, 1)]
    for cell in compared(first, second, num_resamples=10).cells:
        lost = won = labels = lost_examples = won_examples = num_examples = 0
        differences = []
        for ours, theirs in zip(first, second, strict=True):
            per_slice = []
            for part in ("x", "y") if cell.slice == MEAN else (cell.slice,):
                a, b, place, right = ours.examples[part], theirs.examples[part], 0, [0, 0]
                total = 0
                for turns in a.num_labels:
                    seen = []
                    for turn, count in enumerate(turns, 1):
                        for _ in range(count):
                            if cell.turn in (None, turn):
                                seen.append((a.right[place], b.right[place]))
                            place += 1
                    lost += sum(was and not now for was, now in seen)
                    won += sum(now and not was for was, now in seen)
                    all_right = [bool(seen) and all(pair[side] for pair in seen) for side in (0, 1)]
                    lost_examples += all_right[0] and not all_right[1]
                    won_examples += all_right[1] and not all_right[0]
                    num_examples += bool(seen)
                    total += len(seen)
                    right = [right[side] + sum(pair[side] for pair in seen) for side in (0, 1)]
                assert place == len(a.right)
                labels += total
                per_slice.append((right[1] - right[0]) / total)
            differences.append(np.mean(per_slice))
        assert vars(cell.flips) == {
            "lost": lost, "won": won, "num_labels": labels, "lost_examples": lost_examples,
            "won_examples": won_examples, "num_examples": num_examples,
        }  # fmt: skip
        assert cell.difference == pytest.approx(np.mean(differences))
        assert cell.second - cell.first == pytest.approx(cell.difference)


# What is refused.


def test_what_cannot_be_paired_is_refused_by_name():
    ours = run("a", 0, {"s": single([True])})
    for other, name in (
        (run("b", 1, {"s": single([True])}), "seed = '0 and 1'"),
        (run("b", 0, {"s": single([True])}, task="text"), "task.type = 'mqar and text'"),
        (run("b", 0, {"s": single([True])}, data="d"), "examples = "),
    ):
        with pytest.raises(ConfigError, match=f"{name}.*must be the same in both"):
            compared([ours], [other])
    far = run("b", 0, {"s": single([True])}, data="d")
    moved = replace(far, record=replace(far.record, training=replace(far.record.training, data_sha256="f" * 64)))
    with pytest.raises(ConfigError, match="data = 'None and ffffffffff'"):
        compared([ours], [moved])
    config = far.record.config | {"task": far.record.config["task"] | {"num_test": 9}}
    with pytest.raises(ConfigError, match=r"task.num_test = 'None and 9'"):
        compared([ours], [replace(far, record=replace(far.record, config=config))])
    with pytest.raises(ConfigError, match="turns of slice s = '2 and 1'"):
        compared([run("a", 0, {"s": many(0)})], [run("b", 0, {"s": many(0, num_turns=1)})])


def test_seeds_without_a_partner_are_said():
    first = [run("a", seed, {"s": many(seed)}) for seed in (0, 1, 3)]
    second = [run("b", seed, {"s": many(seed)}) for seed in (3, 0, 2)]
    found = compared(first, second, num_resamples=10)
    assert (found.seeds, found.unpaired) == ((0, 3), (1, 2))
    assert found.run_ids == (("amodel0", "amodel3"), ("bmodel0", "bmodel3"))


# Ceilings.


def test_a_ceiling_is_the_full_run_of_the_same_weights_on_the_same_examples():
    rows = {"s": many(0)}
    full = run("mha", 0, rows).record
    lossy = run("mha", 0, rows, format="int4").record
    others = [
        run("mha", 0, rows, weights="v"), run("mha", 1, rows), run("mqa", 0, rows), run("mha", 0, rows, data="e"),
        run("mha", 0, rows, format="int8"),
    ]  # fmt: skip
    others = [other.record for other in others]
    assert Ceilings([*others, full]).of(lossy) == full
    assert Ceilings(others).of(lossy) is None
    assert Ceilings([]).of(full) is full
    alike = replace(full, run_id="zz", config=full.config | {"memory": {"format": "model", "page_size": 4}})
    paged = replace(lossy, config=lossy.config | {"memory": {"format": "int4", "page_size": 4}})
    assert Ceilings([full, alike]).of(paged) is alike
    old = replace(full, examples=None)
    assert Ceilings([old]).of(lossy) is old


@pytest.mark.parametrize(
    ("memory", "is_so"),
    [
        ({}, True),
        ({"format": "model", "compression": "none", "selection": "all"}, True),
        ({"format": "model", "compression": None, "selection": None}, True),
        ({"compression": {"type": "none"}, "selection": {"name": "all"}}, True),
        ({"format": "int8"}, False),
        ({"compression": "snapkv"}, False),
        ({"compression": {"type": "snapkv", "budget": 0.5}}, False),
        ({"selection": "quest"}, False),
    ],
)
def test_a_full_memory_drops_rounds_and_passes_over_nothing(memory, is_so):
    assert is_full(record(memory=memory)) is is_so
    if "compression" in memory:  # or as a section of its own
        assert is_full(record(memory={}, compression=memory["compression"])) is (
            memory["compression"] in ("none", None, {"type": "none"})
        )


def test_a_cell_has_its_ceiling_and_whether_it_tells_something():
    good, bad = single([True] * 19 + [False]), single([True] * 3 + [False] * 17)
    full = [run("mha", seed, {"easy": good, "hard": bad}) for seed in (0, 1)]
    low = [run("mha", seed, {"easy": bad, "hard": bad}, format="int4") for seed in (0, 1)]
    cells = {cell.slice: cell for cell in compared(full, low, num_resamples=10).cells}
    assert {name: cell.ceilings for name, cell in cells.items()} == {
        MEAN: pytest.approx((0.55, 0.55)), "easy": (0.95, 0.95), "hard": (0.15, 0.15),
    }  # fmt: skip
    assert {name: cell.discriminative for name, cell in cells.items()} == {MEAN: False, "easy": True, "hard": False}
    cells = {cell.slice: cell for cell in compared(full, low, num_resamples=10, floor=0.1).cells}
    assert {name: cell.discriminative for name, cell in cells.items()} == {MEAN: True, "easy": True, "hard": True}
    alone = compare(low, low, names=("A", "B"), ceilings=Ceilings([]), num_resamples=10)
    assert {(cell.ceilings, cell.discriminative) for cell in alone.cells} == {((None, None), None)}
    turns = compared([run("mha", 0, {"s": many(0)})], [run("mha", 0, {"s": many(1)}, format="int4")], num_resamples=10)
    for cell in turns.cells:
        assert cell.ceilings[1] == pytest.approx(cell.first)
