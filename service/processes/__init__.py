"""A server of several processes: a supervisor, front ends that speak HTTP, and the engine's process."""
