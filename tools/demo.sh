#!/usr/bin/env bash
# Set-up, then the demo: conversations that survive memory pressure and kill -9, beside re-reading every turn.
#
#   tools/demo.sh                  with the bundled model
#   tools/demo.sh --model MODEL    with your own: a folder or a hub id
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

"$checkout/tools/setup.sh"
# Python must not take the caller's folder for ours: it may have a package `tools` of its own.
PYTHONSAFEPATH=1 exec "$checkout/.venv/bin/python" -m tools.demo "$@"
