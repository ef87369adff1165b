"""The ledger: what must stay live (`states`), and who holds which page. No JAX."""
