"""Side-by-side benchmarks: ours and a peer, or a physical limit, on the same inputs in the same run. `python -m evals.bench --list` names them.

This package alone of `evals` drives the packages it measures; nothing imports it.
"""
