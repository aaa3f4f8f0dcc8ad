"""Files: atomic writes, shards, images, locks, hub downloads, and UserError. No torch."""
