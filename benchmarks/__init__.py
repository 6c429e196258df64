"""What benchmark.py measures, and the results kept as data."""
