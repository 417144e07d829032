"""Compiled CPU kernels: Numba turns the loops in `kernels/` into vector code at first use and caches it on disk.

The modules here are the PyTorch side (custom ops, gradients, fake shapes); they import the kernels when first run,
so that importing mambakit does not load Numba.
"""
