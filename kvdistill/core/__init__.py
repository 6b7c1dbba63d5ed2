"""Rank 0: the nouns everything else is made of. Nothing here knows a model, a task or a command."""
