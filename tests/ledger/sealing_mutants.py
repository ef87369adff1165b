"""The planted bugs of sealing: what is wrong, where, and the named test that must notice."""

from kvlab.ledger import accounting, sealed, sealing, store
from kvlab.ledger.retention import Sealing
from tests.ledger import test_sealing
from tests.ledger.mutant import Mutant

SEALED_PAGES = test_sealing.test_pages_that_are_full_and_old_enough_are_sealed_and_the_open_ones_are_free_at_once
SEALING = [
    Mutant(
        "a page is sealed one token early",
        Sealing,
        "due",
        "num_open - self.residual",
        "num_open - self.residual + 1",
        test_sealing.test_when_and_how_many_are_closed_forms,
        (True,),
    ),
    Mutant(
        "a prompt is sealed in the middle of a chunk",
        Sealing,
        "due",
        "or length % self.chunk_len",
        "",
        test_sealing.test_when_and_how_many_are_closed_forms,
        (False,),
    ),
    Mutant(
        "admission forgets that a prompt is held open once",
        Sealing,
        "most",
        "prompt_len if self.after_prompt else",
        "0 if self.after_prompt else",
        test_sealing.test_long_sequences_fit_where_little_stays_open_and_no_others,
    ),
    Mutant(
        "open pages stay held when they are sealed",
        sealing,
        "_move",
        "store.repack(holding, pages[count:])",
        "store.repack(holding, pages)",
        SEALED_PAGES,
    ),
    Mutant(
        "the newest pages are sealed, not the oldest",
        sealing,
        "_move",
        "zip(pages[:count], taken",
        "zip(pages[-count:], taken",
        SEALED_PAGES,
    ),
    Mutant(
        "sealed tokens are open ones as well",
        sealing,
        "_move",
        "store.shorten(holding, held.length, num_open)",
        "pass",
        SEALED_PAGES,
    ),
    Mutant(
        "a step writes the page behind the sealed ones",
        sealed.SealedStore,
        "_write_slots",
        "np.full((len(pages), width), self.state.num_pages * self.state.page_size, np.int32)",
        "PageStore._write_slots(self, pages, steps, starts, counts, width)",
        SEALED_PAGES,
    ),
    Mutant(
        "a sequence with sealed pages goes on publishing",
        sealing,
        "seal",
        "publisher.close(held)",
        "pass",
        test_sealing.test_a_prompt_is_found_up_to_its_first_sealing_and_not_behind,
    ),
    Mutant(
        "sealing does not wait for pages",
        sealing,
        "seal",
        "if wait := stores[number].shortage(count):",
        "if wait := None:",
        test_sealing.test_sealed_pages_that_are_short_are_waited_for,
    ),
    Mutant(
        "a draft passes the place of a sealing",
        Sealing,
        "next_due",
        "self.residual + self.page_size - num_open",
        "self.residual + self.page_size - num_open + 2",
        test_sealing.test_no_step_and_no_draft_passes_a_sealing,
    ),
    Mutant(
        "pages behind a sealed prefix keep it from being evicted",
        store.Store,
        "evict",
        "self.index.in_the_way(self.number)",
        "()",
        test_sealing.test_published_pages_behind_a_sealed_prefix_do_not_keep_it_from_being_evicted,
    ),
    Mutant(
        "scales by channel are not accounted",
        accounting,
        "_pages",
        "int(live.any(axis=1)[counted].sum())",
        "0",
        test_sealing.test_accounts_sum_and_say_what_is_where,
    ),
]
