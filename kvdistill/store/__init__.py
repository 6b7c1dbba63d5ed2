"""Rank 1: the only door to teacher bytes: shards with checksums (`shards.py`), the targets in them (`packed.py`)."""
