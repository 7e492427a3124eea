#!/usr/bin/env bash
# Everything that needs a GPU, one command, one report:
#
#   tools/gpu_suite.sh                        under ten minutes; writes tools/results/gpu_suite_<gpu>.json
#   tools/gpu_suite.sh --only speeds          one section of it
#   tools/gpu_suite.sh --dry-run              without a GPU: builds and compiles everything, runs the references
#
# Nothing is installed: it takes .venv, or else the system's python3 with what that has.  Wheels in the folder
# wheels/, if there is one, are unpacked into a temporary folder for as long as this runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=python3
if [[ -x .venv/bin/python ]]; then
    python=.venv/bin/python
fi
if compgen -G 'wheels/*.whl' >/dev/null; then
    unpacked=$(mktemp -d)
    trap 'rm -rf "$unpacked"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$unpacked" wheels/*.whl
    export PYTHONPATH="$unpacked${PYTHONPATH:+:$PYTHONPATH}"
fi
export TOKENIZERS_PARALLELISM=false
"$python" -m tools.gpu_suite "$@"
