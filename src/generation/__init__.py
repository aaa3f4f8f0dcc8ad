"""What generate, serve and demo share: reading requests, sampling them in batches, writing JSON lines."""
