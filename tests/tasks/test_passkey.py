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


def examples(task):
    """Every example of a task: its two rows, their labels, and the positions before them."""
    parts = iter(task.slices("test"))
    for first, second in zip(parts, parts, strict=True):
        batches = [task.eval_batch(jax.random.key(0), "test", part, 0, part.num_examples) for part in (first, second)]
        of_turns = [
            zip(rows_of(batch), *map(np.asarray, (batch.labels, batch.label_positions)), strict=True)
            for batch in batches
        ]
        for turns in zip(*of_turns, strict=True):
            yield (first, second), turns


@pytest.mark.parametrize("query_aware", [False, True])
def test_each_question_is_asked_of_the_text_and_no_answer_stands_in_it(hay, query_aware):
    """Every row is taken apart, and put together again from its parts with Python's own strings."""
    task = Passkey(PasskeyConfig(contexts=(300, 400), path=hay, num_test=40, query_aware=query_aware))
    test_text = bytes(TEXT[28_500:]).decode()
    asked_first, names, places, rows = 0, set(), [], set()
    for parts, turns in examples(task):
        (row, *_), (second_row, *_) = turns
        keys = {}
        for found in NEEDLE.finditer(row):
            name, key, again, name_again = found.groups()
            assert (name, key) == (name_again, again)
            keys[name] = key
        (first, first_at), (second, second_at) = [
            (name, found.start()) for name, found in zip(keys, NEEDLE.finditer(row), strict=True)
        ]
        answers = ["".join(map(chr, labels)) for _, labels, _ in turns]
        asked = next(name for name in keys if keys[name] == answers[0])
        other = second if asked == first else first
        assert answers[1] == keys[other]
        questions = FIRST.format(asked), SECOND.format(other)
        text = row.removesuffix(questions[0] + keys[asked])
        between = questions[0][:-2] if query_aware else ""
        assert second_row == text + between + questions[1] + keys[other]
        for part, (whole, _, before), answer in zip(parts, turns, answers, strict=True):
            assert len(whole) == part.seq_len
            assert [whole[place + 1] for place in before] == list(answer)
        assert parts[0].turns == ()
        assert parts[1].turns == (len(text + between),)
        compressed = [len(text + (questions[0][:-1] if query_aware else "")), len(text + between)]
        assert [part.compress_at for part in parts] == compressed
        assert [part.prompt_len for part in parts] == [len(text + questions[0]), len(second_row) - 5]
        body = NEEDLE.sub("", text)
        assert body in test_text
        statement = next(NEEDLE.finditer(row)).group()
        rebuilt = body[:first_at] + statement + body[first_at : second_at - len(statement)]
        assert row.startswith(rebuilt + row[second_at : second_at + len(statement)])
        assert "0" not in (answers[0][0], answers[1][0])
        asked_first += asked == first
        names |= set(keys)
        rows.add(row)
        places += [first_at / len(body), (second_at - len(statement)) / len(body)]
    assert len(rows) == 80
    assert 20 < asked_first < 60  # a coin, of 80
    assert names == set(NAMES)
    assert 0.08 < min(places) < 0.2 < 0.7 < max(places) <= 0.8  # [10%, 80%), rounded down to a token


def test_training_has_both_questions_in_a_row(hay):
    task = Passkey(PasskeyConfig(contexts=(320,), path=hay))
    batch = task.train_batch(task.train_data(), jax.random.key(0), 3, 320, task.knobs(jax.random.key(1), 3))
    for row, labels in zip(rows_of(batch), np.asarray(batch.labels), strict=True):
        answers = "".join(map(chr, labels))
        assert len(row) == 320
        assert re.search(rf"\nThe pass key of \w+ is {answers[:5]}\nWhich number .* It was {answers[5:]}$", row)


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


def test_when_a_memory_compresses_changes_validation_but_no_first_turn(hay):
    before, behind = (
        compose(["task=passkey", f"task.path={hay}", f"task.query_aware={word}"]) for word in ("false", "true")
    )
    assert isinstance(before, Config)
    assert before.training_id != behind.training_id  # the best step is chosen by validation, second turns included
    assert before.run_id != behind.run_id
    batches = []
    for config in (before, behind):
        task = config.make_task()
        part = task.slices("test")[0]
        batches.append(task.eval_batch(jax.random.key(2), "test", part, 0, 3))
    jax.tree.map(np.testing.assert_array_equal, *batches)
