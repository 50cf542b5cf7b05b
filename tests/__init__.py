"""Flat on purpose: a `tests/model/` would shadow the package under test.

Two libraries read their settings when they are first imported, so those are set first of all.
"""

import os

# OpenMP's threads yield their core while they wait: if they spin, training on a busy machine takes much longer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
