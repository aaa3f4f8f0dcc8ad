"""Several processes: collectives, FSDP2 sharding, and checkpoints that are whole or not there."""
