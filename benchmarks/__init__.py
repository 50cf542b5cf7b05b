"""Benchmarks: run all with `make benchmarks`, or one with `python -m benchmarks.<module>`."""
