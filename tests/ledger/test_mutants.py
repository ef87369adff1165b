"""Deliberately planted bugs, each with the named test that catches it: proof that those tests can fail.

A mutant is one method with one piece of its source replaced. The classes are the ones the tests use, so the named test
simply runs again and must now fail.
"""

import inspect
import textwrap
from typing import NamedTuple

import pytest

from kvlab.ledger import (
    accounting,
    committing,
    compaction,
    paged,
    prefix,
    publisher,
    recurrent,
    sharing,
    states,
    store,
    stores,
    swapping,
)
from kvlab.ledger import ledger as ledger_module
from pallas_kernels import visible
from pallas_kernels.visible import Visible
from tests.ledger import (
    test_compaction,
    test_contiguous,
    test_ledger,
    test_machine,
    test_prefix,
    test_replacement,
    test_states,
)


class Mutant(NamedTuple):
    """What is wrong, where, the text replaced, and the test that must notice."""

    bug: str
    owner: object
    method: str
    old: str
    new: str
    caught_by: object
    arguments: tuple = ()


RANDOM = (test_machine.test_random_operations_keep_every_invariant, (0,))
MUTANTS = [
    Mutant(
        "a double free is clamped at zero",
        store.Store,
        "drop",
        "self.refs[page] -= 1",
        "self.refs[page] = max(0, self.refs[page] - 2)",
        *RANDOM,
    ),
    Mutant(
        "a fork does not count its references",
        sharing,
        "forked",
        "store.share(page)",
        "pass",
        test_ledger.test_a_shared_page_is_copied_by_whoever_writes_it_and_kept_by_the_last,
    ),
    Mutant(
        "a shared page is written in place",
        paged.PageStore,
        "missing",
        "self.refs[holding.pages[page]] > 1",
        "self.refs[holding.pages[page]] > 9",
        test_ledger.test_a_shared_page_is_copied_by_whoever_writes_it_and_kept_by_the_last,
    ),
    Mutant(
        "a cancelled copy keeps the page that was never copied",
        paged.PageStore,
        "settle",
        "if ran:",
        "if True:",
        test_ledger.test_a_cancelled_copy_gives_the_shared_page_back,
    ),
    Mutant(
        "pages are visible before the step that writes them is committed",
        ledger_module.Ledger,
        "reserve",
        "held.num_new, held.lookahead = num_new, lookahead",
        "held.num_new, held.lookahead = num_new, lookahead; held.length += num_new; "
        "held.ids and self._publisher.seal(held); held.length -= num_new",
        test_prefix.test_nothing_is_visible_before_its_step_was_committed,
    ),
    Mutant(
        "rejected drafts are published",
        committing,
        "settle",
        "held.length += num_accepted",
        "held.length += num_accepted or held.num_new",
        test_ledger.test_a_rejected_recurrent_step_leaves_the_old_state_where_it_was,
    ),
    Mutant(
        "a lookup misses the pages that commit_each has put off",
        ledger_module.Ledger,
        "lookup",
        "self.publish()",
        "pass",
        test_prefix.test_pages_that_commit_each_fills_are_published_before_anybody_could_miss_them,
    ),
    Mutant(
        "a sequence waits although its page has a twin",
        ledger_module.Ledger,
        "reserve",
        "if not self._publisher.waiting:",
        "if True:",
        test_prefix.test_a_full_page_is_given_up_for_its_twin_before_a_sequence_is_told_to_wait,
    ),
    Mutant(
        "a hit is not pinned",
        sharing,
        "look_up",
        "store.share(cached.page)",
        "pass",
        test_prefix.test_a_hit_is_pinned_until_it_is_let_go,
    ),
    Mutant(
        "a hit covers the whole prompt",
        prefix.PrefixIndex,
        "match",
        "max(0, num_tokens - 1)",
        "num_tokens",
        test_prefix.test_a_resent_prompt_of_any_length_hits,
        ("full", test_prefix.Checkpoints("all")),
    ),
    Mutant(
        "tokens are not compared, only their hash",
        prefix.PrefixIndex,
        "find",
        "node.parent is parent and node.tokens == tokens",
        "True",
        test_prefix.test_a_hash_that_always_collides_costs_time_only,
    ),
    Mutant(
        "a window's hit looks for one page less",
        prefix.PrefixIndex,
        "_valid",
        "missing[run.stop] == missing[run.start]",
        "missing[run.stop] == missing[min(run.start + 1, run.stop)]",
        test_prefix.test_a_hit_needs_every_page_that_is_live_there,
    ),
    Mutant(
        "a hybrid's hit forgets the recurrent state",
        prefix.PrefixIndex,
        "_valid",
        "return path[pages - 1].pages[index] is not None",
        "return True",
        test_prefix.test_no_kept_states_no_hit_on_hybrids,
    ),
    Mutant(
        "an ancestor is evicted before its descendants",
        prefix.PrefixIndex,
        "_queue",
        "self.whole_prefix[index] and cached.node.resident_children[index]",
        "False",
        *RANDOM,
    ),
    Mutant(
        "pages leave the window one token early",
        visible.Visible,
        "forgotten_at",
        "position + self.window",
        "position + self.window - 1",
        test_states.test_a_page_is_free_when_its_last_slot_is_forgotten,
        (states.TokenState(1, 1, 1, visible=Visible(window=5)),),
    ),
    Mutant(
        "pages leave the window one token late",
        paged.PageStore,
        "forget",
        "end <= length",
        "end < length",
        test_ledger.test_windowed_layers_free_what_leaves_the_window,
    ),
    Mutant(
        "sinks are forgotten with the window",
        visible.Visible,
        "forgotten_at",
        "position < self.num_sinks",
        "position < 0",
        test_states.test_nothing_forgotten_is_recalled,
        (states.TokenState(1, 1, 1, visible=Visible(window=5, num_sinks=2)),),
    ),
    Mutant(
        "a failed allocation keeps what it took",
        stores.Stores,
        "take",
        "store.drop(page)",
        "pass",
        test_ledger.test_an_allocation_that_fails_in_the_middle_changes_nothing,
    ),
    Mutant(
        "admission forgets the null page",
        stores.Stores,
        "never",
        "else state.num_usable",
        "else state.num_pages",
        test_ledger.test_a_wait_that_nobody_can_end_is_never,
    ),
    Mutant(
        "lookahead slots count as live",
        accounting,
        "_pages",
        "written[physical] |= held_slots < num_stored",
        "written[physical] |= held_slots < num_stored + num_new + lookahead",
        test_ledger.test_lookahead_slots_are_accounted_and_given_back,
    ),
    Mutant(
        "a shared page is accounted twice",
        accounting,
        "_pages",
        "counted = num_tables > 0",
        "counted = num_tables",
        test_ledger.test_accounts_add_up_in_sums_tables_and_frames,
    ),
    Mutant(
        "what is swapped out keeps its device pages",
        swapping,
        "swap_out",
        "stores.let_go(held)",
        "stores.free_rows.append(held.holdings[0].row)",
        test_ledger.test_swapping_frees_the_device_and_brings_the_same_pages_back,
    ),
    Mutant(
        "a recurrent step is always in place",
        recurrent.StateStore,
        "missing",
        "if self.refs[holding.pages[0]] == 1 and not lookahead:",
        "if self.refs[holding.pages[0]] == 1:",
        test_ledger.test_a_rejected_recurrent_step_leaves_the_old_state_where_it_was,
    ),
    Mutant(
        "buddies do not merge",
        test_contiguous.Buddy,
        "give",
        "while (neighbour",
        "while False and (neighbour",
        test_contiguous.test_blocks_never_overlap_and_merge_back,
        (48,),
    ),
    Mutant(
        "the most recently used goes first",
        test_replacement.POLICIES["lru"],
        "order",
        "page.last_used,",
        "-page.last_used,",
        test_replacement.test_every_policy_is_its_textbook,
        ("lru",),
    ),
    Mutant(
        "pages behind what a compaction kept stay held",
        paged.PageStore,
        "settle",
        "num_stored = length - holding.dropped",
        "num_stored = length",
        test_compaction.test_what_is_behind_the_kept_slots_is_free_at_once_and_tokens_go_on_from_there,
    ),
    Mutant(
        "a compacted class starts one slot late",
        store.Store,
        "plan",
        "starts[: len(steps)] -= np.array([holding.dropped",
        "starts[: len(steps)] -= np.array([holding.dropped - (holding.dropped > 0)",
        test_compaction.test_what_is_behind_the_kept_slots_is_free_at_once_and_tokens_go_on_from_there,
    ),
    Mutant(
        "a step reserves pages by tokens, not by slots",
        paged.PageStore,
        "missing",
        "start - holding.dropped, end - holding.dropped - 1",
        "start, end - 1",
        test_compaction.test_what_is_behind_the_kept_slots_is_free_at_once_and_tokens_go_on_from_there,
    ),
    Mutant(
        "a compacted sequence goes on publishing",
        publisher.Publisher,
        "close",
        "held.ids = None",
        "pass",
        test_compaction.test_nothing_is_published_after_a_compaction,
        ("compact",),
    ),
    Mutant(
        "pages put off are published although their step has packed them",
        publisher.Publisher,
        "close",
        "self.forget(held)",
        "pass",
        test_compaction.test_pages_put_off_are_not_published_once_their_step_has_packed_them,
    ),
    Mutant(
        "a fork forgets that its parent was compacted",
        sharing,
        "forked",
        "dropped=holding.dropped",
        "dropped=0",
        test_compaction.test_forks_and_swaps_carry_the_slots,
    ),
    Mutant(
        "what is swapped out forgets that it was compacted",
        swapping,
        "swap_out",
        ", dropped=holding.dropped",
        "",
        test_compaction.test_forks_and_swaps_carry_the_slots,
    ),
    Mutant(
        "what is swapped in forgets that it was compacted",
        swapping,
        "swap_in",
        ", dropped=old.dropped",
        "",
        test_compaction.test_forks_and_swaps_carry_the_slots,
    ),
    Mutant(
        "a packed page is taken for the index's page of the prompt",
        swapping,
        "_is_sealed",
        "not holding.dropped",
        "True",
        test_compaction.test_forks_and_swaps_carry_the_slots,
    ),
    Mutant(
        "a step packs into pages that others share",
        compaction,
        "check_own",
        "store.is_shared(holding, keep)",
        "False",
        test_compaction.test_what_cannot_be_is_refused_and_changes_nothing,
    ),
    Mutant(
        "a compaction packs into published pages",
        compaction,
        "_own",
        "if store.refs[page] == 1",
        "",
        test_compaction.test_a_published_prompt_stays_for_others_and_the_copy_is_its_sequences_own,
    ),
    Mutant(
        "a page is handed on before all that read it have",
        compaction,
        "_packed",
        "for shortened in wanted:\n",
        "for shortened in wanted[:1]:\n",
        test_compaction.test_forks_keep_what_they_share_and_those_compacted_together_read_it_first,
    ),
    Mutant(
        "a compacted sequence is refused what its tokens would need",
        stores.Stores,
        "never",
        "held.holdings[number].dropped if held else 0",
        "0",
        test_compaction.test_a_sequence_that_was_compacted_may_outgrow_the_pool,
    ),
    Mutant(
        "slots that were dropped are accounted as live",
        accounting,
        "_pages",
        "num_stored = length - holding.dropped",
        "num_stored = length",
        test_compaction.test_what_is_behind_the_kept_slots_is_free_at_once_and_tokens_go_on_from_there,
    ),
    Mutant(
        "the index keeps what a sequence alone needs to go on",
        compaction,
        "_reclaimable",
        "len(found) >= count",
        "True",
        test_compaction.test_pages_that_are_short_are_waited_for_and_alone_nobody_waits,
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_the_named_test_catches(mutant, monkeypatch, tmp_path):
    function = getattr(mutant.owner, mutant.method)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutant.old) >= 1, f"{mutant.method} no longer holds {mutant.old!r}: rewrite this mutant"
    namespace: dict = {}
    module = inspect.getmodule(function)
    exec(
        compile(source.replace(mutant.old, mutant.new), f"<mutant of {mutant.method}>", "exec"),
        vars(module) | namespace,
        namespace,
    )
    monkeypatch.setattr(mutant.owner, mutant.method, namespace[mutant.method])
    wanted = inspect.signature(mutant.caught_by).parameters
    fixtures = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    arguments = [*mutant.arguments, *(fixtures[name] for name in wanted if name in fixtures)]
    with pytest.raises(
        (AssertionError, pytest.fail.Exception, KeyError, ValueError, MemoryError, IndexError, RuntimeError)
    ):
        mutant.caught_by(*arguments)


def test_the_tests_pass_without_mutants():
    """The same calls, on the code as it is: a named test that fails anyway proves nothing."""
    for mutant in {(mutant.caught_by, mutant.arguments): mutant for mutant in MUTANTS}.values():
        if not {"monkeypatch", "tmp_path"} & set(inspect.signature(mutant.caught_by).parameters):
            mutant.caught_by(*mutant.arguments)
