"""Data on its way to training: shards are read in an order that is a pure function, and become batches."""
