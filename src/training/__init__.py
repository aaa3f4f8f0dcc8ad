"""What a training run is made of: components, strategy, processes, its folder, its memory plan, Slurm."""
