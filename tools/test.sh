#!/usr/bin/env bash
# Set-up, format, lint, strict types and tests. Arguments go on to pytest:
#
#   tools/test.sh                             all but the tests that need a GPU or long
#   tools/test.sh tests/rpc -k resume -x
#   tools/test.sh -m heavy                    wider grids and longer soaks
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools/setup.sh --dev
export PATH="$PWD/.venv/bin:$PATH"
# Tests run small products in many processes: threads that spin for work would only take the cores from each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
export TOKENIZERS_PARALLELISM=false

selection=(-m "not gpu and not multi_gpu and not heavy")
for argument in "$@"; do
    case $argument in -m | -m?*) selection=() ;; esac
done

echo "format, lint and types:"
ruff format --check
ruff check
mypy

status=0
python -m pytest ${selection[@]+"${selection[@]}"} -rs --durations=10 "$@" || status=$?

echo "lines per room, generated code not counted:"
for room in kernels engine rpc tools tests; do
    lines=$(find "$room" \( -name '*.py' -o -name '*.[ch]' -o -name '*.sh' -o -name '*.proto' \) \
        -not -path '*/_generated/*' -exec cat {} + | wc -l)
    printf '  %-8s %6d\n' "$room" "$lines"
done
exit "$status"
