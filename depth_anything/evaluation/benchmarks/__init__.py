"""Public benchmarks, one module each with facts and a reader; `catalog` lists them."""
