"""What the OpenMP runtime keeps between parallel regions."""

import ctypes
import os
from contextlib import suppress

from kernels.native.build import openmp_runtime

_HARD = 2  # omp_pause_hard of omp.h: nothing is kept


def release_threads() -> None:
    """Ends the OpenMP threads that wait for the calling thread's next parallel region, which starts new ones.

    GNU OpenMP counts them: where all its threads are more than the cores, none of them waits awake for the
    microseconds between two regions, and every region begins with a wake-up by the system.  A thread that is
    done with parallel regions leaves the cores to the one that is not.
    """
    with suppress(OSError, AttributeError):  # another runtime than the one torch brings
        ctypes.CDLL(openmp_runtime(), mode=os.RTLD_NOLOAD).omp_pause_resource_all(_HARD)
