# Sourced: `install_dirl [EXTRA]` makes .venv in the repository root, installs dirl[EXTRA] into it once, and puts it on PATH.
#
#   PYTHON=/path/to/python3.x   the interpreter .venv is made from (default: python3)
#   NO_VENV=1                   install nothing: use the Python on PATH as it is (clusters, containers)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
    printf '%s\n' "$1" >&2
    exit 2
}

check_python() {
    command -v "$1" >/dev/null || die "dirl needs Python >= 3.10, but there is no '$1': install it or set PYTHON=/path/to/python3"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "dirl needs Python >= 3.10, but $1 is $("$1" -c 'import platform; print(platform.python_version())'): set PYTHON=/path/to/python3"
}

make_venv() {
    local python=${PYTHON:-python3} version
    check_python "$python"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python cannot make virtual environments: apt-get install python$version-venv (Debian), then run this again"
    "$python" -m venv "$ROOT/.venv" || die "$python could not make $ROOT/.venv: delete that directory and run this again"
}

# One name per content of pyproject.toml, place of the repository (an editable install holds its path) and interpreter.
install_key() {
    "$ROOT/.venv/bin/python" - "$ROOT" <<'PY'
import hashlib, pathlib, sys
root = sys.argv[1]
key = f"{root} {sys.version} ".encode() + pathlib.Path(root, "pyproject.toml").read_bytes()
print(hashlib.sha256(key).hexdigest()[:16])
PY
}

install_dirl() {
    local extra=${1:-} key stamp target=$ROOT
    [[ -z ${NO_VENV:-} ]] || return 0
    "$ROOT/.venv/bin/python" -c 'import pip' 2>/dev/null || make_venv
    check_python "$ROOT/.venv/bin/python"
    key=$(install_key)
    stamp=$ROOT/.venv/.installed_${extra:-base}_$key
    # An install with an extra contains the base install.
    if [[ ! -e $stamp ]] && ! { [[ -z $extra ]] && compgen -G "$(printf '%q' "$ROOT/.venv")/.installed_*_$key" >/dev/null; }; then
        [[ -z $extra ]] || target="$ROOT[$extra]"
        echo "installing dirl${extra:+[$extra]} into $ROOT/.venv (once; a few minutes) ..."
        "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$target" ||
            die "pip could not install dirl${extra:+[$extra]} (its reason is above): check the network or PIP_INDEX_URL, then run this again"
        : >"$stamp" # only now: an interrupted install starts over
    fi
    export PATH="$ROOT/.venv/bin:$PATH"
}

# What only some tests need: install_for_tests MODULE PIP_ARGUMENTS... Where it cannot be installed, they are skipped.
install_for_tests() {
    [[ -z ${NO_VENV:-} ]] || return 0
    "$ROOT/.venv/bin/python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null && return 0
    "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}" ||
        echo "$1 could not be installed (its reason is above): its tests will be skipped" >&2
}
