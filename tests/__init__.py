"""Flat on purpose: a `tests/model/` would shadow the package under test.

Triton reads when it is first imported whether to interpret kernels on the CPU, so that is said first of all.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
