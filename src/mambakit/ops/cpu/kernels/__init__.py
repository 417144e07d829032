"""Numba kernels. Each works on a range of independent tasks, so that `threads.run` can share them out."""
