"""Matmul of activations with one weight matrix, whose rows' bits depend on nothing around them."""
