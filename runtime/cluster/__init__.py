"""The trial cluster: real Slurm nodes on one machine."""
