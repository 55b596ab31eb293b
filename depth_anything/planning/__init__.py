"""Plan a run on a cluster before it starts: hours, GPU-hours, cores, bytes, network, checkpoints, failures, money.

The figures are computed, not measured; `plan.py` says which inputs are measured and which are assumed.
"""
