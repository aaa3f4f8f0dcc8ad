"""Rounds of the online loop: drafts -> expert -> shards."""
