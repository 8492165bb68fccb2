# Sourced by demo.sh and test.sh: `prepare_environment EXTRA` sets $venv_python and $venv_bin, installing what is missing.
#
# An active environment (VIRTUAL_ENV) is used, then .venv in the project, and that one is made where there is neither.
# A stamp in the environment says what was installed; the second call of a script installs nothing.
# shellcheck shell=bash

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s\n' "$*" >&2; }

die() {
  say "error: $*"
  exit 1
}

# Whether $1 runs and is new enough. A name on the PATH may be a shim that has no Python behind it.
is_python_311() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
    if is_python_311 "$name"; then
      command -v "$name"
      return
    fi
  done
  die "no Python 3.11 or newer on the PATH (python3 is: $(python3 --version 2>&1 || true))." \
    "Install one, or activate an environment that has it."
}

# Makes the environment $1. Some systems ship Python without ensurepip: then the system's pip installs pip into it.
make_environment() {
  local venv=$1 python
  python=$(find_python)
  say "Making the environment $venv with $python ..."
  # Half an environment would be taken for a whole one next time.
  # shellcheck disable=SC2064
  trap "rm -rf $(printf %q "$venv")" EXIT
  if "$python" -c 'import ensurepip' >/dev/null 2>&1; then
    "$python" -m venv "$venv"
  else
    "$python" -m venv --without-pip "$venv"
    if ! "$python" -m pip --python "$venv/bin/python" --disable-pip-version-check install --quiet pip; then
      die "$python can neither make an environment with pip (no ensurepip) nor install pip (22.3 or newer) into one." \
        "On Debian and Ubuntu: apt-get install python3-venv."
    fi
  fi
  trap - EXIT
}

prepare_environment() {
  local extra=$1 venv=${VIRTUAL_ENV:-$project/.venv} stamp target wanted
  venv_python=$venv/bin/python venv_bin=$venv/bin
  if [ -z "${VIRTUAL_ENV:-}" ] && [ ! -e "$venv" ]; then
    make_environment "$venv"
  fi
  is_python_311 "$venv_python" ||
    die "$venv is no environment with Python 3.11 or newer. Deactivate or remove it; this script makes a new one."

  # What an installation depends on; the path, because it is an editable one.
  wanted=$("$venv_python" -c '
import hashlib, pathlib, sys
project = pathlib.Path(sys.argv[1])
content = b"".join((project / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
print(hashlib.sha256(content + f"{project} {sys.version}".encode()).hexdigest())' "$project")
  stamp=$venv/.xmc-midx-installed${extra:+-$extra}
  # An environment for the tests serves the demo as well.
  local file
  for file in "$stamp" "$venv/.xmc-midx-installed-dev"; do
    if [ -x "$venv_bin/xmc-midx" ] && [ -f "$file" ] && [ "$(cat "$file")" = "$wanted" ]; then
      return
    fi
  done
  target=$project${extra:+[$extra]}
  say "Installing xmc-midx${extra:+ with what its tests need} into $venv (the first time takes minutes) ..."
  rm -f "$stamp"
  "$venv_python" -m pip --disable-pip-version-check install --quiet -c "$project/constraints.txt" -e "$target" ||
    die "the installation failed; pip's message is above. Run the script again to resume."
  printf '%s\n' "$wanted" >"$stamp"
}
