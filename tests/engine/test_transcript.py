"""The text of an answer, token by token: joined it is the whole text, stop strings are found wherever they lie, and a
token costs what it costs, whatever came before."""

import random
import time

import pytest

from kvlab.engine.transcript import Transcript


class Pieces:
    """Tokens that are pieces of bytes; some are silent, as special tokens are, and like SentencePiece's decoder it
    strips a space in front of the first one that is not."""

    def __init__(self, *pieces: bytes, strips: bool = False):
        self.pieces, self.strips, self.num_decoded = pieces, strips, 0

    def encode(self, text, *, special=True):
        raise NotImplementedError

    def decode(self, ids):
        self.num_decoded += len(ids)
        text = b"".join(self.pieces[each] for each in ids).decode(errors="replace")
        return text.removeprefix(" ") if self.strips else text


def run(tokenizer, ids, stops=()):
    transcript, shown = Transcript(tokenizer, stops), []
    for token in ids:
        shown.append(transcript.add(token))
        if transcript.stopped:
            break
    shown.append(transcript.finish())
    return transcript, shown


@pytest.mark.parametrize("seed", range(20))
def test_what_is_shown_is_the_text(seed):
    """Random cuts of text in one to four bytes; a stop string cuts the text where it first stands."""
    rng = random.Random(seed)
    whole = "".join(rng.choice(["a", "b", " ", "é", "€", "🙂", "END"]) for _ in range(200)).encode()
    cuts = sorted(rng.sample(range(1, len(whole)), len(whole) // 2))
    pieces = [whole[low:high] for low, high in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    tokenizer, ids = Pieces(*pieces), range(len(pieces))
    transcript, shown = run(tokenizer, ids)
    assert "".join(shown) == transcript.text == whole.decode()
    for stop in ("END", "€a", "ab a", "🙂", "never"):
        cut, shown = run(tokenizer, ids, (stop, "nor this"))
        place = whole.decode().find(stop)
        assert cut.stopped == (place >= 0)
        assert "".join(shown) == cut.text == (whole.decode() if place < 0 else whole.decode()[:place])


def test_a_stop_string_in_a_token_that_begins_a_character_ends_the_answer_there():
    tokenizer = Pieces(b"yes", b" END\xe2", b"\x82\xac")
    transcript = Transcript(tokenizer, ("END",))
    assert transcript.add(0) == "yes"
    transcript.add(1)
    assert transcript.stopped
    assert transcript.text == "yes "


@pytest.mark.parametrize("num_silent", [1, 5, 40])
def test_the_space_after_tokens_that_show_nothing_stays(num_silent):
    tokenizer = Pieces(b" one", b"", b" two", strips=True)
    ids = [0, 0, *[1] * num_silent, 2, *[1] * num_silent, 2]
    transcript, shown = run(tokenizer, ids)
    assert "".join(shown) == transcript.text == "one one two two"


@pytest.mark.parametrize("pieces", [(b"\x80",), (b"\xe2",), (b"\xac\xe2\x82",), (b"",)])
def test_answers_that_never_form_a_character_cost_as_much_a_token(pieces):
    tokenizer = Pieces(b"a", *pieces)
    transcript, shown = run(tokenizer, [0, *[1] * 5_000])
    assert "".join(shown) == transcript.text == (b"a" + pieces[0] * 5_000).decode(errors="replace")
    assert tokenizer.num_decoded < 5_000 * (90 if pieces == (b"",) else 30)


def test_an_end_inside_a_character_is_one_sign_however_often_it_is_asked_for():
    transcript = Transcript(Pieces(b"a\xe2\x82"))
    assert transcript.add(0) == "a"
    assert transcript.finish() == "\N{REPLACEMENT CHARACTER}"
    assert transcript.finish() == ""
    assert transcript.text == "a\N{REPLACEMENT CHARACTER}"


def test_a_long_stop_string_costs_little_a_token():
    stop = "ab" * 50_000
    transcript = Transcript(Pieces(b"ab" * 5), (stop, "ab" * 49_000 + "c"))
    began = time.process_time()
    for _ in range(2_000):
        assert transcript.add(0) == ""
    assert (time.process_time() - began) / 2_000 < 2e-3, "seconds a token"
    assert transcript.text == "ab" * 10_000
