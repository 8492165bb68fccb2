#!/usr/bin/env bash
# Installs what the tests need where it is not yet, then lint, format, types and tests; arguments go to pytest.
set -euo pipefail

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment dev
cd "$project"
"$venv_python" -m ruff check .
"$venv_python" -m ruff format --check .
"$venv_python" -m mypy
# A process for each core; one that runs out of tests takes some over from the others.
exec "$venv_python" -m pytest --numprocesses auto --dist worksteal "$@"
