"""Data for training and evaluation: reads shards in a reproducible order and collates samples into batches."""
