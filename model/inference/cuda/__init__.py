"""The CUDA backend: Triton operators, replayed from CUDA graphs in a fixed set of batch sizes."""
