# Install mquant and everything that mquant can use into a venv in .venv. quickstart.sh, test.sh and
# test-loaders.sh source this file. A second run is fast: pip runs only if pyproject.toml or
# constraints.txt has changed.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=${MQUANT_VENV:-$root/.venv}
stamp=$(cat pyproject.toml constraints.txt | cksum)

if [ ! -x "$venv/bin/python" ]; then
    python=""
    for candidate in python3.13 python3.12 python3.11 python3; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "mquant needs Python 3.11 or newer; none was found on PATH." >&2
        exit 1
    fi
    "$python" -m venv "$venv"
fi

if [ "$(cat "$venv/.mquant-installed" 2>/dev/null)" != "$stamp" ]; then
    echo "Installing into $venv (about 2 minutes the first time) ..."
    # Install torch first, alone: pip then takes the CPU build if constraints.txt pins that build.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt \
        -e '.[oneshot,ray,dev]'
    echo "$stamp" >"$venv/.mquant-installed"
fi
PATH=$venv/bin:$PATH
export PATH
