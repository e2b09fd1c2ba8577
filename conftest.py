"""Read by pytest for the tests and for the chapters alike."""

import os

import torch

pytest_plugins = ["lib.book.nbval_claims"]

if not torch.cuda.is_available():  # Triton's own interpreter runs its kernels without a GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
