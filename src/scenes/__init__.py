"""Scenes: the embedded data. Graph (what is there), grammar (what may be said of it), render (what it looks like)."""
