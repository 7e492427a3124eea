"""The kernels in plain C: build.py compiles them, library.py loads them, kernels/dispatch.py decides; memory.py
gives them huge pages to read."""
