"""What sequences computed becomes readable by others: full pages and recurrent states enter the prefix index."""

from kvlab.ledger.checkpoints import Checkpoints
from kvlab.ledger.store import Holding, Store
from kvlab.ledger.stores import Stores
from kvlab.ledger.tokens import ITEM
from kvlab.ledger.tracked import Tracked
from kvlab.ledger.trie import Node


class Publisher:
    """Publishes pages once they are full and committed, at once or when `publish` is called; `checkpoints` says which
    recurrent states are kept."""

    def __init__(self, stores: Stores, checkpoints: Checkpoints):
        self.stores, self.index, self.checkpoints = stores, stores.index, checkpoints
        self.waiting: list[Tracked] = []
        """Sequences with full pages that are not published yet."""

    def publish(self) -> None:
        """Publishes what was put off."""
        while self.waiting:
            self.seal(held := self.waiting.pop(0))
            self.stores.refresh(held)

    def forget(self, held: Tracked) -> None:
        """What a sequence has put off is not published any more."""
        if held in self.waiting:
            self.waiting.remove(held)

    def close(self, held: Tracked) -> None:
        """Nothing of a sequence is published from now on: what it computes depends on what was dropped."""
        self.forget(held)
        held.ids = None

    def clip(self, held: Tracked, num_new: int) -> int:
        """See `Ledger.clip`."""
        if held.ids is None or not self.stores.of_states:
            return num_new
        page_size = self.index.page_size
        for boundary in range(held.length // page_size + 1, (held.length + num_new) // page_size + 1):
            if self.keeps(held, boundary):
                return boundary * page_size - held.length
        return num_new

    def keeps(self, held: Tracked, boundary: int) -> bool:
        """Whether the recurrent state after `boundary` pages is to be kept."""
        return self.checkpoints.wants(boundary, (held.prompt_len - 1) // self.index.page_size, held.junction)

    def seal(self, held: Tracked) -> None:
        """Publishes full pages whose ids are known, and the recurrent states that are to be kept."""
        assert held.ids is not None
        page_size, page_bytes, tip = self.index.page_size, self.index.page_size * ITEM, held.path[-1]
        num_sealed = min(held.length, len(held.ids) // ITEM, self._most(held)) // page_size
        while (logical := len(held.path) - 1) < num_sealed:
            ids = bytes(held.ids[logical * page_bytes : (logical + 1) * page_bytes])
            node = self.index.find(held.path[-1], ids, grow=True)
            assert node is not None
            held.path.append(node)
            for store, holding in zip(self.stores.each, held.holdings, strict=True):
                if store.state.paged and logical in holding.pages:
                    self._offer(store, holding, node, logical)
        if num_sealed and held.length == num_sealed * page_size and self.keeps(held, num_sealed):
            self._keep_states(held, in_answer=held.length > held.prompt_len)
        if held.path[-1] is not tip:
            held.path[-1].locks += 1
            self.index.unlock(tip)

    def _most(self, held: Tracked) -> int:
        """Tokens of a sequence that others may read. Where prompts are read in another way than what follows them,
        nothing of an answer: to others it would be part of a prompt."""
        if not self.stores.has_dense_prompts:
            return held.length
        return held.prompt_len if held.compress_at is None else held.compress_at

    def _offer(self, store: Store, holding: Holding, node: Node, logical: int) -> None:
        """Publishes a sequence's page, or gives it up for the identical one that the index has."""
        own, cached = holding.pages[logical], node.pages[store.number]
        if cached is None:
            store.publish(node, own)
        elif cached.page != own:
            store.share(cached.page)
            store.drop(own)
            store.assign(holding, logical, cached.page)
            self.stores.counters.deduplicated_pages += 1

    def _keep_states(self, held: Tracked, *, in_answer: bool) -> None:
        """Publishes the recurrent states at the end of the path; the newest of an answer replaces the one before."""
        node = held.path[-1]
        for store in self.stores.of_states:
            self._offer(store, held.holdings[store.number], node, 0)
        if in_answer and self.checkpoints.name == "junctions":
            for old in held.rolling:
                if old.loose and old.uses == 1 and old.node.pages[old.state_class] is old:
                    self.stores[old.state_class].withdraw(old)
            kept = (node.pages[store.number] for store in self.stores.of_states)
            held.rolling = [cached for cached in kept if cached is not None]
