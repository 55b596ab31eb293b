"""Readers of raw data, a file a data set."""
