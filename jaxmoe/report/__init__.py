"""Benchmark records, tables and plots."""
