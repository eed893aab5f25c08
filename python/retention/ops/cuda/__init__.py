"""The compiled CUDA kernels: which calls they take, plans of calls, and the launch."""
