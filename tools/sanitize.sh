#!/usr/bin/env bash
# Runs the tests of the kernels with the C code under AddressSanitizer and UndefinedBehaviorSanitizer, by every
# instruction set of this machine. The first finding ends it. Needs gcc, and tools/setup.sh --dev. Arguments go on to
# pytest in the place of tests/kernels.
#
# The sanitizer's malloc is there before Python, so that tensors lie in it too: a kernel made to compute one row too
# many was reported as a heap-buffer-overflow in store_as. Memory that the system maps, as that of packed weights
# (kernels/native/memory.py), has no borders that it could see.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

runtimes=()
for name in asan ubsan; do
    runtime=$(gcc -print-file-name="lib$name.so" 2>/dev/null || true)
    if [ ! -f "$runtime" ]; then
        echo "The kernels were not tested under sanitizers: no gcc with lib$name.so here."
        exit 0
    fi
    runtimes+=("$runtime")
done

export CONTINUO_SANITIZE=address,undefined
export ASAN_OPTIONS=detect_leaks=0 # Python and torch keep much until the process ends
export UBSAN_OPTIONS=print_stacktrace=1
export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE
# pytest's capture would swallow the last words of a process that a sanitizer ends.
# What Triton makes is no C of ours.
[ $# -gt 0 ] || set -- tests/kernels --ignore-glob "*/test_gpu_*" --ignore tests/kernels/test_interpreted.py
LD_PRELOAD="${runtimes[*]}" exec .venv/bin/python -m pytest -q -s "$@"
