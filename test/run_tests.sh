#!/usr/bin/env bash
# Sets up, then runs lint, types and all tests, three files at a time; arguments go to pytest (-n0: one at a time).
# shellcheck source=test/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up "$ROOT/requirements.txt" "$ROOT/requirements-test.txt"
cd "$ROOT" || exit 2
set -e
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/shellcheck" -x test/*.sh bench/*.sh .ci/run
# OpenMP's threads sleep while they wait, because the other files' tests want the cores
OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} "$PYTHON" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
