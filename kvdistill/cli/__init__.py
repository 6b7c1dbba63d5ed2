"""Rank 5: the verbs (`app.py`) and what they print."""
