"""Collects nothing unless Triton interprets; see __init__.py."""

import os

import pytest

from kernels import dispatch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def triton_kernels():
    with dispatch.use("triton"):
        yield
