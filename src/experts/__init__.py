"""Experts: what tells wrong spans of a draft from right ones, behind the protocol `src.types.Expert`."""
