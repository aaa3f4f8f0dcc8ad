"""Objectives: LightningModules, one per file, each a corruption and a table of loss terms over kinds."""
