"""The formulas of ``merging.kernels`` again, compiled for a CPU; for ``merging.engines`` alone."""
