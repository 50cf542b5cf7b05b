"""Flat on purpose: a `tests/model/` would shadow the package under test."""
