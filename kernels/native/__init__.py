"""The kernels in plain C: build.py compiles them, library.py loads them, kernels/dispatch.py decides."""
