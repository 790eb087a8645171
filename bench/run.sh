#!/usr/bin/env bash
# Sets up as the other scripts do, then prints one table of what this machine does.
# shellcheck source=test/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../test/common.sh"
set_up "$ROOT/requirements.txt"
exec "$PYTHON" "$ROOT/bench/run.py" "$@"
