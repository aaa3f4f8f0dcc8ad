"""What generate, serve and demo share: reading requests, answering them in batches, writing JSON lines."""
