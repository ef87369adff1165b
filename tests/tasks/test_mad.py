"""MAD's tasks against solvers in plain Python, which read a sequence from left to right and know nothing else."""

from collections import Counter
from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.random import named_key
from kvlab.schema import ConfigError
from kvlab.tasks.mad import PATTERNS, Mad, MadConfig, Memorisation, Sizes
from tests.tasks import contracts

ROWS = 300


@cache
def drawn(pattern, split="test", seed=0, **changes):
    """The task, and a batch as lists: tokens, and by position the labels that count."""
    task = Mad(MadConfig(pattern=pattern, **changes))
    if split == "train":
        seq_len, _ = task.train_call(0, 1)
        batch = task.train_batch((), named_key(seed, "x"), ROWS, seq_len, jnp.zeros((), jnp.int32))
    else:
        (part,) = task.slices(split)
        assert part.name == pattern
        batch = task.eval_batch(named_key(seed, "x"), split, part, 0, ROWS)
    rows = []
    for tokens, positions, labels, weights in zip(*jax.tree.leaves(jax.tree.map(np.asarray, batch)), strict=True):
        real = np.flatnonzero(weights)
        assert set(weights[real].tolist()) == {1.0}
        asked = dict(zip(positions[real].tolist(), labels[real].tolist(), strict=True))
        assert len(asked) == len(real), "a position has one label"
        rows.append((tokens.tolist(), asked))
    return task, rows


def pairs(tokens, keys, values):
    """Keys and values one after the other, with the position behind each key; what is neither stands alone."""
    found, place = [], 0
    while place < len(tokens):
        parts = []
        for kind in (keys, values):
            start = place
            while place < len(tokens) and tokens[place] in kind:
                place += 1
            parts.append((start, tuple(tokens[start:place])))
        (_, key), (start, value) = parts
        assert bool(key) == bool(value), "no key without a value, and none the other way"
        if key:
            found.append((key, start, value))
        else:
            found.append((None, place, (tokens[place],)))
            place += 1
    return found


def recalled(tokens, keys, values):
    """The values of keys that were shown before, each token at the position before it."""
    known, asked = {}, {}
    for key, start, value in pairs(tokens, keys, values):
        if key is None:
            continue
        if key in known:
            assert value == known[key], "a key has one value all through a sequence"
            asked |= {start + place - 1: token for place, token in enumerate(known[key])}
        known[key] = value
    return asked


RECALL = {
    "in_context_recall": (range(8), range(8, 16), {}),
    "noisy_recall": (range(8), range(8, 16), {}),
    "fuzzy_recall": (range(7), range(7, 15), {}),
    "fuzzy_recall of 41 tokens": (range(7), range(7, 15), {"seq_len": 41, "max_key_len": 2, "max_value_len": 4}),
    "noisy_recall of 20 tokens": (range(3), range(3, 6), {"vocab_size": 8, "num_noise_tokens": 2, "seq_len": 20}),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", RECALL)
def test_recall_is_solved_by_a_dictionary(name, split):
    keys, values, changes = RECALL[name]
    task, rows = drawn(name.split()[0], split, **changes)
    assert task.num_choices == len(values)
    for tokens, asked in rows:
        assert len(tokens) == task.context_len
        assert asked == recalled(tokens, keys, values)
        assert asked, "the last key was shown before"
        assert tokens[max(asked) + 1 :] == [asked[max(asked)]], "which ends the sequence"
    shown = [{key: value for key, _, value in pairs(tokens, keys, values) if key} for tokens, _ in rows]
    common = Counter(key for row in shown for key in row).most_common(1)[0][0]
    assert len({row[common] for row in shown if common in row}) > 1, "another value in another sequence"


@pytest.mark.parametrize("split", ["train", "test"])
def test_fuzzy_keys_and_values_have_all_lengths_and_tests_the_longest_keys(split):
    _, rows = drawn("fuzzy_recall", split)
    found = [pair for tokens, _ in rows for pair in pairs(tokens, range(7), range(7, 15))]
    real = [(key, value) for key, _, value in found if key]
    num_keys, num_values = (Counter(len(pair[side]) for pair in real) for side in (0, 1))
    assert set(num_values) == {1, 2, 3}
    assert min(num_values.values()) > 0.2 * len(real), "drawn alike"
    assert set(num_keys) == ({3} if split == "test" else {1, 2, 3})
    assert all(len(set(motif)) == len(motif) for pair in real for motif in pair)
    for tokens, _ in rows:
        first = next(place for place, token in enumerate(tokens) if token != 15)
        assert 15 not in tokens[first:], "padding comes first"
        assert first < 2 * 6, "and is less than two pairs"


def test_the_share_of_noise_is_what_is_asked_for():
    _, rows = drawn("noisy_recall", noise_share=0.4)
    noise = np.array([np.array(tokens).reshape(-1, 2) >= 16 for tokens, _ in rows])
    assert (noise[..., 0] == noise[..., 1]).all(), "noise comes in pairs of tokens"
    assert not noise[:, -1].any()
    # 31 pairs before the last, one of which is never noise.
    assert noise[:, :-1].mean() == pytest.approx(0.4 * 30 / 31, abs=5 * np.sqrt(0.24 / (ROWS * 31)))
    assert {token for tokens, _ in rows for token in tokens if token >= 16} == set(range(16, 32))
    (least,) = [drawn("noisy_recall", noise_share=1.0)[1]]
    assert all(len(asked) == 1 and sum(token < 16 for token in tokens) == 4 for tokens, asked in least)


def test_selective_copying_is_solved_by_leaving_out_blanks():
    task, rows = drawn("selective_copying")
    (part,) = task.slices("test")
    places = []
    for tokens, asked in rows:
        content, (copy, *rest) = tokens[: part.prompt_len - 1], tokens[part.prompt_len - 1 :]
        told = [token for token in content if token != 14]
        assert (copy, rest) == (15, [14] * 8), "behind the copy token there are blanks, and no answers"
        assert asked == {part.prompt_len + place: token for place, token in enumerate(told)}
        places.append([place for place, token in enumerate(content) if token != 14])
    often = np.bincount(np.ravel(places), minlength=part.prompt_len - 1) / ROWS
    assert np.abs(often - 8 / 55).max() < 5 * np.sqrt(8 / 55 * 47 / 55 / ROWS), "any place is as likely"


def test_compression_is_solved_by_looking_up_places():
    task, rows = drawn("compression")
    (part,) = task.slices("test")
    assert (part.seq_len, part.prompt_len, task.vocab_size) == (63, 32, 16 + 31)
    for tokens, asked in rows:
        assert tokens[31] == 15
        assert max(tokens[:31]) < 15
        assert tokens[32:] == list(range(16, 47)), "questions are the same in all sequences"
        assert asked == {position: tokens[token - 16] for position, token in enumerate(tokens) if token >= 16}


def test_memorisation_is_solved_by_what_training_told():
    _, trained = drawn("memorisation", "train")
    facts: dict[int, set[int]] = {}
    for tokens, asked in trained:
        for position, label in asked.items():
            facts.setdefault(tokens[position - 1], set()).add(label)
    task, rows = drawn("memorisation", seed=5)
    for tokens, asked in rows:
        assert tokens[1::2] == [255] * 16
        assert max(tokens[::2]) < 127, "no value is shown"
        assert list(asked) == list(range(1, 32, 2))
        assert [facts[tokens[position - 1]] for position in asked] == [{label} for label in asked.values()]
    assert sorted(facts) == list(range(127))
    assert sorted(label for (label,) in facts.values()) == list(range(127, 254)), "one to one"
    assert task.num_choices == 127
    assert not np.array_equal(Memorisation(Sizes(256, 32)).facts, np.arange(127, 254))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_blind_guess_scores_chance(pattern):
    """Labels are uniform among the choices, at the first asked position and over all."""
    task, rows = drawn(pattern)
    for labels in ([label for _, asked in rows for label in asked.values()], [min(a.items())[1] for _, a in rows]):
        often = np.bincount(labels, minlength=task.vocab_size)
        often = often[often > 0] / len(labels)
        assert len(often) <= task.num_choices
        # Labels of one sequence go together: in the worst case there is one draw of a sequence.
        assert often.max() - 1 / task.num_choices < 5 * np.sqrt(1 / task.num_choices / ROWS)
    assert task.chance == 1 / task.num_choices


@pytest.mark.parametrize("pattern", RECALL)
def test_no_answer_stands_at_or_before_its_question_but_where_it_was_shown(pattern):
    """Without the pairs of its own key, what stands before a question is the same for every answer."""
    keys, values, changes = RECALL[pattern]
    _, rows = drawn(pattern.split()[0], **changes)
    for tokens, asked in rows:
        starts = {start: key for key, start, _ in pairs(tokens, keys, values) if key}
        for start, key in starts.items():
            if start - 1 in asked:
                before = [each for each, other in starts.items() if other == key and each < start]
                assert before, "it was shown"
                assert tokens[start - len(key) : start] == list(key), "the question is the key alone"
        assert all(tokens[position + 1] == label for position, label in asked.items()), "the answer comes behind"
        assert all(low < high for low, high in pairwise(asked))


@pytest.mark.parametrize("meets", contracts.CONTRACT[:3], ids=lambda meets: meets.__name__.removeprefix("assert_"))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_meets_the_contract(pattern, meets, monkeypatch):
    monkeypatch.setitem(contracts.SMALL, "mad", {"pattern": pattern, "num_validation": 3, "num_test": 5})
    meets("mad")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise_share": 0.2}, r"noise_share = 0\.2: must be null with pattern = in_context_recall: .* noisy_recall"),
        ({"pattern": "compression", "num_copied": 3}, "num_copied = 3: must be null .* one of selective_copying"),
        ({"seq_len": 63}, "seq_len = 63: must be even"),
        ({"seq_len": 2}, "seq_len = 2: must be at least 4: a pair is of up to 2 tokens, and one is there twice"),
        ({"pattern": "fuzzy_recall", "seq_len": 11}, "seq_len = 11: must be at least 12"),
        ({"pattern": "fuzzy_recall", "vocab_size": 6}, "vocab_size = 6: must be at least 7: .* 3 tokens each"),
        ({"pattern": "noisy_recall", "vocab_size": 17}, "vocab_size = 17: must be at least 18: .* 16 are others"),
        ({"pattern": "selective_copying", "num_copied": 32}, "seq_len = 64: must be at least 66: 32 tokens"),
        ({"pattern": "memorisation", "vocab_size": 2}, "vocab_size = 2: must be at least 3"),
        ({"pattern": "recall"}, "pattern = 'recall': must be one of in_context_recall, fuzzy_recall"),
    ],
)
def test_impossible_sizes_are_refused_by_name(changes, words):
    with pytest.raises(ConfigError, match=words):
        MadConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"seq_len": 4, "vocab_size": 2},
        {"pattern": "fuzzy_recall", "seq_len": 12, "vocab_size": 7},
        {"pattern": "noisy_recall", "vocab_size": 18, "seq_len": 4},
        {"pattern": "selective_copying", "vocab_size": 3, "num_copied": 31},
        {"pattern": "compression", "vocab_size": 2, "seq_len": 2},
        {"pattern": "memorisation", "vocab_size": 3, "seq_len": 2},
    ],
    ids=lambda changes: changes.get("pattern", "in_context_recall"),
)
def test_the_least_that_is_legal_can_be_drawn(changes):
    task, rows = drawn(**{"pattern": "in_context_recall", **changes})
    assert all(asked and max(tokens) < task.vocab_size for tokens, asked in rows)
