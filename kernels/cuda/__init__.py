"""The CUDA backend, from sm_70 (V100) on; one file an op. The kernels are in csrc/cuda/."""
