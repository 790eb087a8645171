#!/usr/bin/env bash
# Evaluates DLRM.pth of the current folder: bash test/train_eval_8p.sh --data_path=DIR | --demo
# shellcheck source=test/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate 8 "$@"
