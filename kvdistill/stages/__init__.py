"""Rank 3: the stages, in the order of the data. They read and write one run folder and meet only on disk."""
