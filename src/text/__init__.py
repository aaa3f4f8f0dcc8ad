"""Tokenizer, prompt formats, and the alignment of an expert's edits with tokens."""
