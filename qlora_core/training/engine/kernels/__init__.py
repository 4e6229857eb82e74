"""Triton kernels. Nothing here is imported on a machine without CUDA."""
