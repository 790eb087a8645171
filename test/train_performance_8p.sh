#!/usr/bin/env bash
# Measures training speed: bash test/train_performance_8p.sh --data_path=DIR | --demo
# shellcheck source=test/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
train_performance 8 "$@"
