"""Networks of containers. Knows neither Slurm nor images."""
