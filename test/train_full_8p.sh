#!/usr/bin/env bash
# Trains the published model, with evaluations: bash test/train_full_8p.sh --data_path=DIR | --demo
# shellcheck source=test/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
train_full 8 "$@"
