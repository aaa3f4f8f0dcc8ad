"""Training runs: components from the config, strategies, processes, run folder, memory plan, Slurm jobs."""
