"""What a device can do: finding it, NPU, GPU, execution flags, threads, CPU and Triton kernels."""
