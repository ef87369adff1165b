"""Capacity: the ledger without the device. What a model's memory holds, for whom, and how fast it could be read."""
