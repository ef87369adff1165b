"""The newest page goes first."""

from kvlab.ledger.replacement import Order, Policy
from kvlab.ledger.trie import CachedPage


class Newest(Policy):
    """What a scan over more than fits wants."""

    def order(self, page: CachedPage) -> Order:
        return (-page.last_used,)
