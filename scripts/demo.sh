#!/usr/bin/env bash
# Installs xmc-midx where it is not yet, and runs the whole chain on the embedded dataset: `xmc-midx demo` and its options.
set -euo pipefail

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment ""
exec "$venv_bin/xmc-midx" demo "$@"
