"""Grouped matmul: rows times the matrix of the expert each row belongs to."""
