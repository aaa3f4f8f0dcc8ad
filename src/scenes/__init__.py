"""Scenes, the embedded data: graph (objects), grammar (captions), render (images), score (captions vs. graph)."""
