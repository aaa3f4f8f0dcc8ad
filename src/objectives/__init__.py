"""Objectives: LightningModules, one per file, each a table over kinds and a corruption."""
