"""Public benchmarks: facts in rows, a reader each; `catalogue` names them all."""
