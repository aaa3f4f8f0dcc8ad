"""Text to tokens and back, text edits to token spans, prompt formats."""
