"""Files: atomic writes, shards, images, locks, and the errors that a user can act on. No torch."""
