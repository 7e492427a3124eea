#!/usr/bin/env bash
# Makes .venv in this checkout ready to serve (the extra `server`), or to develop as well (`dev`).
#
#   tools/setup.sh [--dev]        CONTINUO_SETUP=dev is the same as --dev
#
# No sudo, and nothing is written outside the checkout but pip's cache. Run again, it returns at once unless something
# that it depends on has changed. CONTINUO_TORCH_INDEX names the package index to take torch from: see pick_torch.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra=server
if [ "${1:-}" = --dev ] || [ "${CONTINUO_SETUP:-}" = dev ]; then extra=dev; fi
python=.venv/bin/python
log=.venv/setup.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off PYTHONNOUSERSITE=1
unset PYTHONPATH PYTHONHOME

# What the installed packages, and the built kernel, follow from. A stamp that still says the same: nothing to do.
packages() {
    { pwd; "$python" -V; cat pyproject.toml kernels/__init__.py tools/constraints.txt tools/setup.sh; } 2>&1 | cksum
}
kernel() {
    {
        packages
        command -v cc gcc clang || true
        find kernels/native -name '*.[ch]' -o -name '*.py' | LC_ALL=C sort | xargs cat
    } 2>&1 | cksum
}
stamped() { [ -e ".venv/$1.stamp" ] && [ "$(cat ".venv/$1.stamp")" = "$2" ]; }

# begin N TITLE shows a step, finish [NOTE] its time; fail ADVICE says why it ended, and what to do.
begin() { began=$SECONDS; printf '[%s/4] %s ... ' "$1" "$2"; }
finish() { printf '%s%s s\n' "${1:+$1, }" "$((SECONDS - began))"; }
fail() {
    printf 'failed\n'
    {
        if [ -s "$log" ]; then
            tail -n 12 "$log" | sed 's/^/    /'
            printf 'The whole log is in %s. ' "$log"
        fi
        printf '%s\n' "$1"
    } >&2
    exit 1
}
offline="Check the network, the package index and free disk space, and run this again: downloads are kept."

find_python() { # the first that is 3.11 or newer, beginning with the one that the constraints were tested with
    local candidate
    for candidate in python3.11 python3.12 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

make_environment() { # keeps one that works and was made here; pip's scripts in a moved one point to its old place
    if grep -qF "$PWD/.venv" .venv/bin/activate &&
        "$python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))'; then return; fi >/dev/null 2>&1
    local found
    found=$(find_python) ||
        fail "Continuo needs Python 3.11 or newer: install it, so that python3.11 is found, and run this again."
    rm -rf .venv && mkdir .venv
    "$found" -m venv .venv >>"$log" 2>&1 ||
        fail "Install the venv module of $found (Debian, Ubuntu: apt install python3-venv) and run this again."
}

pip_install() { "$python" -m pip install -c tools/constraints.txt "$@" >>"$log" 2>&1 || fail "$offline"; }

install_packages() {
    begin 1 "Python environment in .venv"
    make_environment
    rm -f .venv/*.stamp "$log"
    finish "$("$python" -V)"

    local choice index torch
    choice=$("$python" tools/pick_torch.py 2>>"$log") || { begin 2 torch; fail "$offline"; }
    index=${choice%%$'\n'*} torch=${choice#*$'\n'}
    begin 2 "$torch"
    # From an index that was named only torch itself is taken: what it requires comes with the rest, as tested.
    pip_install ${index:+--no-deps --index-url "$index"} "${torch%% *}"
    "$python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >.venv/torch.txt
    finish

    begin 3 "packages for continuo[$extra]"
    pip_install -c .venv/torch.txt -e ".[$extra]"
    if [ $extra = dev ]; then tools/generate_proto.sh --install >>"$log" 2>&1 || fail "$offline"; fi
    finish
    echo "$(packages) $extra" >.venv/packages.stamp
}

build_kernel() { # without a C compiler the torch kernels serve: slower, with equal results
    begin 4 "native kernel"
    if "$python" -m kernels.native.build >.venv/kernel.txt 2>>"$log"; then
        finish "$(sed -n 's/^kernels: //; $p' .venv/kernel.txt | cut -d, -f1)"
    else
        finish "$(sed -n 's/^kernels: //; $p' "$log" | cut -c 1-150)"
    fi
    kernel >.venv/kernel.stamp
}

# What `dev` installs holds all that `server` needs.
stamped packages "$(packages) dev" || stamped packages "$(packages) $extra" || install_packages
stamped kernel "$(kernel)" || build_kernel
