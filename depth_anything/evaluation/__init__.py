"""Evaluation of models on labeled sets and public benchmarks, and its reports."""
