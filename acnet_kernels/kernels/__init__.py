"""Triton kernels and their launch configurations: no modules, no autograd, no launches."""
