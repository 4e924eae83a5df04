"""Training ACNets on real data: `python -m acnet_kernels train` and `demo`."""
