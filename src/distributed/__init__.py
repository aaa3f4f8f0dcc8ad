"""Several processes: collectives, FSDP2 sharding, and atomic checkpoints."""
