"""What a resent prompt finds again: joint hits over state classes, exact comparison, namespaces, kept recurrent
states."""

import itertools

import numpy as np
import pytest

from kvlab.ledger.answers import Ready
from kvlab.ledger.checkpoints import Checkpoints
from kvlab.ledger.classes import StateClass
from kvlab.ledger.ledger import Ledger
from kvlab.ledger.states import TokenState
from kvlab.ledger.tokens import encode, namespace, page_keys
from pallas_kernels.visible import Visible
from tests.ledger.shadows import CHUNKED, FULL, LATENT, STATE, WINDOWED


def make(specs, page_size=4, num_pages=200, slots=40, max_len=120, chunk_len=16, **options):
    classes = []
    for number, spec in enumerate(specs):
        size, pages = (page_size, num_pages) if spec.per_token else (1, slots)
        classes.append(StateClass(f"c{number}", spec, size, pages, 200 if spec.per_token else 1))
    return Ledger(classes, max_len, chunk_len, page_size=page_size, **options)


def serve(ledger, name, prompt, answer=(), space="", keep=True):
    """A request from lookup to release; returns the tokens it found."""
    hit = ledger.lookup(prompt, space)
    found, done = hit.length, hit.length
    tokens = [*prompt, *answer]
    begun = False
    while done < len(tokens):
        limit = len(prompt) - done if done < len(prompt) else 1
        count = min(ledger.chunk_len, limit)
        count = ledger.clip(name if begun else hit, count)
        assert isinstance(ledger.reserve(name, count, hit=None if begun else hit), Ready)
        begun = True
        ledger.check()
        ledger.commit(name, count, tokens[max(len(prompt), done) : done + count])
        ledger.check()
        done += count
    ledger.release(name, keep=keep)
    ledger.check()
    return found


MODELS = {
    "full": (FULL,),
    "latent": (LATENT,),
    "window": (WINDOWED,),
    "chunked": (CHUNKED,),
    "hybrid": (FULL, WINDOWED, STATE),
    "recurrent": (STATE,),
    "recurrent_window": (CHUNKED, STATE),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "checkpoints", [Checkpoints("junctions"), Checkpoints("all"), Checkpoints("every", 1)], ids=str
)
def test_a_resent_prompt_of_any_length_hits(model, checkpoints):
    """All but its last page: hybrids included, where public engines report none."""
    for length in range(1, 70):
        ledger = make(MODELS[model], checkpoints=checkpoints)
        prompt = list(range(length))
        assert serve(ledger, "a", prompt, [7, 8, 9]) == 0
        assert serve(ledger, "b", prompt, [7]) == (length - 1) // 4 * 4


@pytest.mark.parametrize("interval", [2, 3])
def test_states_kept_every_few_pages_hit_there(interval):
    for length in range(1, 60):
        ledger = make(MODELS["hybrid"], checkpoints=Checkpoints("every", interval))
        serve(ledger, "a", list(range(length)))
        assert serve(ledger, "b", list(range(length))) == (length - 1) // (4 * interval) * 4 * interval


def test_a_hit_needs_every_page_that_is_live_there():
    """A window of 9 over pages of 4 needs the last two full pages; with any one of them gone the hit falls back."""
    spec = TokenState(1, 1, 1, visible=Visible(window=9))
    prompt = list(range(21))
    for gone in range(5):
        ledger = make((spec,))
        serve(ledger, "a", prompt)
        for cached in list(ledger.index.cached[0].values()):
            if cached.start == 4 * gone:
                ledger.stores[0].withdraw(cached)
        ledger.check()
        expected = max(p for p in (0, 4, 8, 12, 16, 20) if gone not in range(max(0, p - 8) // 4, p // 4))
        assert ledger.lookup(prompt).length == expected


def test_no_kept_states_no_hit_on_hybrids():
    ledger = make(MODELS["hybrid"], checkpoints=Checkpoints("none"))
    serve(ledger, "a", list(range(50)))
    assert serve(ledger, "b", list(range(50))) == 0


def test_junctions_keep_the_state_where_prompts_part():
    """Two prompts share 30 tokens; the third finds the state at the boundary where the second left the first."""
    ledger = make(MODELS["hybrid"])
    shared = list(range(30))
    serve(ledger, "a", [*shared, *range(100, 120)])
    assert serve(ledger, "b", [*shared, *range(200, 220)]) == 0  # the first kept only its own end
    assert serve(ledger, "c", [*shared, *range(300, 320)]) == 28


def test_the_next_turn_of_a_conversation_hits_behind_the_answer():
    ledger = make(MODELS["hybrid"])
    prompt, answer = list(range(21)), list(range(50, 73))
    serve(ledger, "a", prompt, answer)
    assert serve(ledger, "b", [*prompt, *answer, 1, 2, 3]) == 44
    kept = len(ledger.index.cached[2])
    assert kept <= 4, f"{kept} states are kept of two turns: an answer's older ones are replaced"


def test_a_hash_that_always_collides_costs_time_only():
    """The chain finds candidates, tokens decide."""
    found = []
    for digest in (None, lambda data: b"same"):
        ledger = make(MODELS["full"], **({"digest": digest} if digest else {}))
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, 2, rng.integers(1, 40)).tolist() for _ in range(30)]
        found.append([serve(ledger, i, prompt) for i, prompt in enumerate(prompts)])
    assert found[0] == found[1]
    assert sum(found[0]) > 0


def test_namespaces_never_share_and_the_same_one_does():
    base = {"parameters": "p", "spec": "s", "page_format": "bf16", "salt": "alice"}
    names = [namespace(**{**base, field: "other"}) for field in base] + [namespace(**base)]
    assert len(set(names)) == 5
    ledger = make(MODELS["full"])
    prompt = list(range(20))
    assert [serve(ledger, name, prompt, space=name) for name in names] == [0] * 5
    assert [serve(ledger, name, prompt, space=name) for name in names] == [16] * 5
    assert namespace(**base) == namespace(**base)
    # Moving a character across a border makes another name.
    assert namespace(parameters="ab", spec="c") != namespace(parameters="a", spec="bc")


def test_nothing_is_visible_before_its_step_was_committed():
    ledger = make(MODELS["full"])
    prompt = list(range(16))
    ledger.reserve("a", 16, hit=ledger.lookup(prompt))
    assert ledger.lookup(prompt).length == 0
    ledger.commit("a", 16)
    assert ledger.lookup(prompt).length == 12


def test_rejected_drafts_are_never_published():
    ledger = make(MODELS["full"])
    ledger.reserve("a", 7, hit=ledger.lookup(list(range(7))))
    ledger.commit("a", 7)
    ledger.reserve("a", 1, lookahead=8)
    ledger.commit("a", 2, [50, 51])
    ledger.release("a")
    assert ledger.lookup([*range(7), 50, 51, 52, 53, 54]).length == 8
    assert len(ledger.index.cached[0]) == 2


def test_a_gap_in_the_ids_is_refused_and_closed_later():
    """Ids that came too late would stand for the wrong tokens: all up to the newest, or none."""
    ledger = make(MODELS["full"])
    ledger.reserve("a", 4, hit=ledger.lookup([1, 2, 3, 4]))
    ledger.commit("a", 4)
    ledger.reserve("a", 1)
    ledger.commit("a", 1)
    ledger.reserve("a", 1)
    with pytest.raises(ValueError, match="5 ids known, for 6 tokens stored: must be as many"):
        ledger.commit("a", 1, [10])
    ledger.commit("a", 1, [9, 10])
    for token in (11, 12):
        ledger.reserve("a", 1)
        ledger.commit("a", 1, [token])
    assert ledger.lookup([1, 2, 3, 4, 9, 10, 11, 12, 0]).length == 8


def test_release_without_keep_leaves_nothing_of_its_own():
    ledger = make(MODELS["hybrid"])
    serve(ledger, "a", list(range(10)))
    before = [set(ledger.index.cached[number]) for number in range(3)]
    serve(ledger, "b", [*range(8), *range(90, 110)], keep=False)
    after = [set(ledger.index.cached[number]) for number in range(3)]
    assert all(now <= then for now, then in zip(after, before, strict=True))
    alone = make(MODELS["hybrid"])
    serve(alone, "a", list(range(10)), keep=False)
    assert not any(alone.index.cached)


def test_a_hit_is_pinned_until_it_is_let_go():
    ledger = make(MODELS["full"], num_pages=6)
    serve(ledger, "a", list(range(17)))
    hit = ledger.lookup(list(range(17)))
    assert hit.length == 16
    assert ledger.evict("c0", 99) == 0
    ledger.unpin(hit)
    assert ledger.evict("c0", 99) == 4
    with pytest.raises(ValueError, match="spent already"):
        ledger.unpin(hit)
    with pytest.raises(ValueError, match="spent already"):
        ledger.reserve("b", 1, hit=hit)


def test_page_keys_are_the_pages_that_a_lookup_can_be_given():
    for length, page in itertools.product(range(1, 20), (1, 4, 7)):
        ledger = make(MODELS["full"], page_size=page)
        serve(ledger, "a", list(range(length)))
        keys = page_keys(list(range(length)), page)
        assert len(keys) * page == ledger.lookup(list(range(length))).length
        assert {node.key for node in ledger.index.nodes()} >= set(keys)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "at least one token"),
        ([1.5], "must be one list of integers"),
        ([[1]], "must be one list of integers"),
        ([3, -1], r"token -1: must be in \[0, 2147483648\)"),
        ([2**31], "token 2147483648"),
        (["a"], "must be one list of integers"),
    ],
)
def test_bad_tokens_are_refused_and_nothing_changes(tokens, message):
    ledger = make(MODELS["full"])
    with pytest.raises(ValueError, match=message):
        ledger.lookup(tokens)
    assert ledger.counters.looked_up_tokens == 0
    ledger.check()


def test_encode_is_little_endian_int32():
    assert encode([1, 258]) == bytes([1, 0, 0, 0, 2, 1, 0, 0])


@pytest.mark.parametrize(("name", "interval"), [("some", 1), ("every", 0)])
def test_unknown_checkpoints_are_refused(name, interval):
    with pytest.raises(ValueError, match="checkpoint"):
        Checkpoints(name, interval)


def decoded(ledger, names, token):
    """One token each, committed together."""
    for name in names:
        assert ledger.reserve(name, 1).ready
    assert all(ledger.commit_each(names, [token] * len(names)))


def test_pages_that_commit_each_fills_are_published_before_anybody_could_miss_them():
    ledger = make(MODELS["full"])
    ledger.reserve("a", 3, hit=ledger.lookup([1, 2, 3]))
    ledger.commit("a", 3)
    decoded(ledger, ["a"], 7)
    assert not ledger.index.cached[0]
    assert ledger.lookup([1, 2, 3, 7, 9]).length == 4
    decoded(ledger, ["a"], 8)
    ledger.check()


def test_a_full_page_is_given_up_for_its_twin_before_a_sequence_is_told_to_wait():
    """Three usable pages, all held; two hold the same tokens, which is found out only when they are published."""
    ledger = make(MODELS["full"], num_pages=4, max_len=8, chunk_len=4)
    for name in ("a", "b"):
        ledger.reserve(name, 3, hit=ledger.lookup([1, 2, 3]))
        ledger.commit(name, 3)
    decoded(ledger, ["a", "b"], 7)
    ledger.reserve("c", 1)
    assert ledger.stores[0].num_available == 0
    assert ledger.reserve("a", 1).ready
    assert ledger.counters.deduplicated_pages == 1
    ledger.check()


@pytest.mark.parametrize("keep", [True, False])
def test_what_a_released_sequence_had_not_published_yet_is_kept_or_not(keep):
    ledger = make(MODELS["full"])
    ledger.reserve("a", 3, hit=ledger.lookup([1, 2, 3]))
    ledger.commit("a", 3)
    decoded(ledger, ["a"], 7)
    ledger.release("a", keep=keep)
    assert ledger.lookup([1, 2, 3, 7, 9]).length == (4 if keep else 0)
    ledger.check()
