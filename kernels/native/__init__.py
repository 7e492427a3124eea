"""The kernels in plain C: build.py compiles them, library.py loads them, kernels/dispatch.py decides.

What they read at every step lies in huge pages, from memory.py.
"""
