"""Devices beyond the usual ones: what CDI files describe, what Slurm granted, and what a step gets of both."""
