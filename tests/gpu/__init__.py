"""Tests of the engine on a CUDA device; `tools/gpu_suite.sh` runs them, also where pytest has no plugins.

`--on cpu` has the CPU's engine in the place of the GPU's: then they test themselves.
"""
