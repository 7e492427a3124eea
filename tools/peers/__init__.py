"""Continuo beside vLLM and llama.cpp on this machine's CPU, each through its own server.

    python -m tools.peers setup DIR
    python -m tools.peers run SHAPE --peers DIR [--model DIR] [--workloads W ...] [--repeats 3] [--json FILE]

All servers run at once, and only one of them has work: within a repeat every engine runs a workload once, in
turn, so that a machine that drifts disturbs all alike.  SHAPE is one of `tools.random_model`.
"""
