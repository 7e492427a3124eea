"""The Triton kernels in Triton's interpreter, on this machine's CPU and in float32: run by
tests/kernels/test_interpreted.py, file by file, each in a process of its own, because TRITON_INTERPRET must
be set before Triton is imported and nothing can be compiled under it.
"""
