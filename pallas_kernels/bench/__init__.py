"""What the kernels of paged memory achieve on the machine at hand: `python -m pallas_kernels.bench`."""
