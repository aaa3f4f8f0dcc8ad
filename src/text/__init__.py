"""How questions are put to a model: one yaml file for each format, read by `src.text.prompt_format`."""
