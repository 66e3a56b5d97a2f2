"""Benchmarks: one file each, plain numbers on stdout. `python -m benchmarks` runs all and writes a report."""
