"""Pass keys are where they should be, stated twice, asked for in two forms; the labels are their digits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlab.compose import compose
from kvlab.config import Config
from kvlab.schema import ConfigError
from kvlab.tasks.passkey import NAMES, Passkey, PasskeyConfig

TEXT = np.random.default_rng(0).integers(97, 123, 30_000, dtype=np.uint8)
NEEDLE = re.compile(r"\nThe pass key of (\w+) is (\d{5})\. Remember it: (\d{5}) is the pass key of (\w+)\.\n")
FIRST = "\nThe pass key of {} is "
SECOND = "\nWhich number was {} told to remember? It was "


@pytest.fixture
def hay(tmp_path):
    path = tmp_path / "hay.txt"
    path.write_bytes(bytes(TEXT))
    return str(path)


def rows_of(batch):
    return [bytes(row.tolist()).decode() for row in np.asarray(batch.tokens)]


def test_a_row_is_text_with_two_keys_and_two_questions(hay):
    """Every row is taken apart, and put together again from its parts with Python's own strings."""
    task = Passkey(PasskeyConfig(contexts=(300, 400), path=hay, num_test=40))
    test_text = bytes(TEXT[28_500:]).decode()
    asked_first, names, places = 0, set(), []
    for part in task.slices("test"):
        batch = task.eval_batch(jax.random.key(0), "test", part, 0, 40)
        for row, labels, before in zip(
            rows_of(batch), *map(np.asarray, (batch.labels, batch.label_positions)), strict=True
        ):
            assert len(row) == part.seq_len
            keys = {}
            for found in NEEDLE.finditer(row):
                name, key, again, name_again = found.groups()
                assert (name, key) == (name_again, again)
                keys[name] = key
            (first, first_at), (second, second_at) = [
                (name, found.start()) for name, found in zip(keys, NEEDLE.finditer(row), strict=True)
            ]
            answers = "".join(map(chr, labels))
            asked = next(name for name in keys if keys[name] == answers[:5])
            other = second if asked == first else first
            assert answers[5:] == keys[other]
            turns = FIRST.format(asked) + keys[asked], SECOND.format(other) + keys[other]
            assert row.endswith("".join(turns))
            assert part.turns == (part.seq_len - len(turns[1]),)
            body = NEEDLE.sub("", row)[: -len("".join(turns))]
            assert body in test_text
            statement = next(NEEDLE.finditer(row)).group()
            rebuilt = body[:first_at] + statement + body[first_at : second_at - len(statement)]
            assert row.startswith(rebuilt + row[second_at : second_at + len(statement)])
            assert [row[place + 1] for place in before] == list(answers)
            assert "0" not in (answers[0], answers[5])
            asked_first += asked == first
            names |= set(keys)
            places += [first_at / len(body), (second_at - len(statement)) / len(body)]
        assert (np.asarray(batch.label_positions) < part.turns[0]).sum(axis=1).tolist() == [5] * 40
        assert len(set(rows_of(batch))) == 40
    assert 20 < asked_first < 60  # a coin, of 80
    assert names == set(NAMES)
    assert 0.08 < min(places) < 0.2 < 0.7 < max(places) <= 0.8  # [10%, 80%), rounded down to a token


@pytest.mark.parametrize("query_aware", [False, True])
def test_a_memory_compresses_before_the_question_or_behind_it(hay, query_aware):
    task = Passkey(PasskeyConfig(contexts=(320,), path=hay, query_aware=query_aware))
    (part,) = task.slices("test")
    (row,) = rows_of(task.eval_batch(jax.random.key(1), "test", part, 0, 1))
    question = row[: part.prompt_len].rindex("\nThe pass key of ")
    assert row[: part.prompt_len].endswith(" is ")
    assert part.compress_at == (part.prompt_len - 1 if query_aware else question)
    assert part.prompt_len < part.turns[0]
    assert row[part.turns[0] :].startswith("\nWhich number was ")


def words_tokenizer(path, known):
    """A tokenizer of words, single letters and single digits; other names are all the same to it."""
    tokenizers = pytest.importorskip("tokenizers")
    words = re.findall(r"\w+|[^\w]", FIRST + SECOND + ". Remember it: the " + " ".join("0123456789abc"))
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(["[UNK]", *words, *known]))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\d|\p{L}+|[^\p{L}\d]"), "isolated")
    made.save(str(path))
    return made


def test_a_row_under_a_tokenizer_says_the_same(tmp_path, hay):
    made = words_tokenizer(tmp_path / "tokenizer.json", ["Carol", "Henry"])
    task = Passkey(PasskeyConfig(contexts=(200,), path=hay, tokenizer=str(tmp_path / "tokenizer.json")))

    def num_tokens(words):
        return len(made.encode(words.replace("[UNK]", "Alice")).ids)

    assert task.vocab_size == made.get_vocab_size()
    haystack = jnp.full((1000,), made.token_to_id("b"), jnp.int32)
    batch = jax.vmap(lambda key: task.example(haystack, key, 200, jnp.asarray(0, jnp.int32)))(
        jax.random.split(jax.random.key(3), 12)
    )
    seen = set()
    for row, labels in zip(np.asarray(batch.tokens), np.asarray(batch.labels), strict=True):
        said = "".join(made.id_to_token(token) for token in row)
        found = re.findall(NEEDLE.pattern.replace(r"(\w+)", r"(\w+|\[UNK\])"), said)
        keys = {name: key for name, key, _, _ in found}
        answers = "".join(made.id_to_token(token) for token in labels)
        asked = next(name for name in keys if keys[name] == answers[:5])
        other = next(name for name in keys if keys[name] == answers[5:])
        statements = [
            f"\nThe pass key of {n} is {k}. Remember it: {k} is the pass key of {n}.\n" for n, k in keys.items()
        ]
        assert {num_tokens(statement) for statement in statements} == {task.needle_len}
        turns = FIRST.format(asked) + keys[asked] + SECOND.format(other) + keys[other]
        rest = 200 - 2 * task.needle_len - num_tokens(turns)
        for statement in statements:
            said = said.replace(statement, "")
        assert said == "b" * rest + turns
        seen |= set(keys)
    assert seen == {"Carol", "Henry", "[UNK]"}


def test_a_tokenizer_that_knows_no_names_or_digits_is_refused(tmp_path, hay):
    words_tokenizer(tmp_path / "nobody.json", [])
    with pytest.raises(ConfigError, match=r"tokenizer = .*must cut two of these names alike: Alice, Carol"):
        PasskeyConfig(path=hay, tokenizer=str(tmp_path / "nobody.json"))
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?")).save(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match=r"tokenizer = .*must have a token of its own for every digit"):
        PasskeyConfig(path=hay, tokenizer=str(tmp_path / "none.json"))


def test_contexts_that_hold_no_questions_are_refused(hay):
    with pytest.raises(ConfigError, match=r"contexts = 200: must be at least \d+: two pass keys, two questions"):
        PasskeyConfig(contexts=(512, 200), path=hay)
    with pytest.raises(ConfigError, match=r"path = '/none'"):
        PasskeyConfig(path="/none")
    with pytest.raises(ConfigError, match="must not name a value twice"):
        PasskeyConfig(contexts=(512, 512), path=hay)


def test_when_a_memory_compresses_changes_no_token_and_no_training(hay):
    before, behind = (
        compose(["task=passkey", f"task.path={hay}", f"task.query_aware={word}"]) for word in ("false", "true")
    )
    assert isinstance(before, Config)
    assert before.training_id == behind.training_id
    assert before.run_id != behind.run_id
    batches = []
    for config in (before, behind):
        task = config.make_task()
        (part,) = task.slices("test")
        batches.append(task.eval_batch(jax.random.key(2), "test", part, 0, 3))
    jax.tree.map(np.testing.assert_array_equal, *batches)
