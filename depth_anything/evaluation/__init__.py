"""Benchmarks, metrics over sets, reports."""
