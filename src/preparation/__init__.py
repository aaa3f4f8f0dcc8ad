"""Datasets as shards: procedural scenes, photographs with annotation files, and texts."""
