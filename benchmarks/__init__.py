"""Measurements: `make benchmarks`, or `python -m benchmarks.<module>` for one of them."""
