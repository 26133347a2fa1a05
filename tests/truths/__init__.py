"""Closed-form answers that the tests compare with, written with NumPy and SciPy and without the package's own code."""
