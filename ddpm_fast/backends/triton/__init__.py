"""Triton kernels: the ops of the reference backend, same names and arguments, on GPUs without a compiler of CUDA."""
