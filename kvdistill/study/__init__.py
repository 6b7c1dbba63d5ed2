"""Rank 4: what runs when, and where. Touches no tensor itself."""
