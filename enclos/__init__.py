"""Enclos: containers with private networks for Slurm job steps."""

__version__ = "0.1.0"
