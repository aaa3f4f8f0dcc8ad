"""Lightning callbacks: one file each, with state of their own where they have any."""
