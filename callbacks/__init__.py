"""Lightning callbacks, one per file; each saves and loads its own state."""
