"""Accuracy, feature kernels, verification."""
