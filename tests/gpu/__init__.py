"""Tests of the engine on a CUDA device; `tools/gpu_suite.sh` runs them, also where pytest has no plugins.

`--on virtual` has a virtual device in the place of the GPU, as tests/cuda: everything but CUDA is real.
"""
