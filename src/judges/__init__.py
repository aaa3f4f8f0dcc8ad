"""Judges: what is asked of a language model about a caption, and how its replies become verdicts. One file a metric."""
