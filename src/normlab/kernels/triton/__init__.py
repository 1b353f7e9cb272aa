"""The kernels for GPUs, in Triton; imported where Triton is installed and a tensor is on one."""
