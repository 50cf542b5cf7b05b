"""Inference: the backends that run a trained network, and `prepare`, which chooses one and checks it."""
