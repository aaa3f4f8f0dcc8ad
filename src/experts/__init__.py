"""Experts: correct the drafts of a model, behind the protocol `src.types.Expert`."""
