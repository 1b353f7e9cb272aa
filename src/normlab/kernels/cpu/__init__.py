"""Compiled kernels for CPUs: one C++ source, built for several instruction sets, through ctypes."""
