"""What the kernels are worth: every operation beside its reference and its peers, in one run."""
