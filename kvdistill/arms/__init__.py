"""Rank 2: an arm with a seed, and the teachers of a study: what stages would otherwise each work out by themselves."""
