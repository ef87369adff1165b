"""The memory: what must stay live (`spec`), who holds which page (`ledger`, `layout`), and the arrays (`pools`)."""
