"""Objectives: LightningModules, one per file, each with a corruption and a table of loss terms per kind."""
