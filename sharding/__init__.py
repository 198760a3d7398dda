"""Meshes, sharding rules, hardware tables, costs, plans and compile-only checks."""
