"""The paper's experiments: `python -m acnet_kernels study …`."""
