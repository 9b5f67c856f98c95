"""The CUDA kernels as C++ of the host, one thread of the operating system a thread of CUDA, under g++'s sanitizers."""
