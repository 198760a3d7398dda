"""Kernels, one folder per operation, each with a reference and one file per backend."""
