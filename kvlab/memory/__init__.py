"""The memory: what must stay live (`spec`), who holds which page (`ledger` and its kin), and the arrays (`layout`, `pools`)."""
