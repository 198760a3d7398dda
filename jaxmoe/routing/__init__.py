"""Routing: which experts each token uses, in six small pure stages."""
