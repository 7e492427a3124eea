"""Everything that needs a GPU in one run, and all of that but the GPU in a dry one.

    sections        what there is to run, and how long each may take; cases, and what becomes of them
    worker          one section in a process of its own, so that what breaks the device ends only that
    environment     versions of everything, the GPU, the commit
    targets         the kernels to be timed, and the times to beat
    inputs, timing  paged steps of random contents; times by replays of CUDA graphs
    rivals          torch's and FlashInfer's attention on the same work
    compiling       launches recorded instead of made, and compiled without a GPU
    accuracy        results against float64, memory full of poison
    correctness, row_checks, speeds, transfers, engine_tests, throughput, conversations    the sections
    random_engine   an engine of a known shape whose weights are drawn on the device; talking: its clients
    report          the table at the end, and the README's

Modules of sections have `run(context)` and `dry_run(context)`, which give figures of the whole section.
"""
