"""The stages as Lightning modules, and what runs them."""

import os

# Read by OpenMP when torch loads: threads that wait actively stall on shared cores (twelve steps in two minutes).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
