"""The hot loops: one file an operation, fast on a CPU (Numba) and on a GPU (Triton).

Every file has the same three parts: a ``reference`` in plain torch, which is the specification; a
kernel for each kind of device; and the door that checks its input and picks one (``dispatch``). A
kernel is here only because no library does as well: the bench (``make bench``) says by how much.
"""
