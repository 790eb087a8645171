#!/usr/bin/env bash
# Checks and measures a machine with an NVIDIA GPU in one command of at most nine minutes, what decides first.
#
#     [PYTHON=python3] [BENCH_COMMIT=NAME] bash bench/first_hour.sh [OUT_DIR] [--device=cpu]
#
# It needs a Python with the packages of requirements.txt, and installs nothing. Each part has a limit of its own; one
# that fails or lasts too long is noted, and the next one begins. OUT_DIR (./first_hour) gets at most eight small files:
# summary.txt, which is the one to read; log.txt, all that the parts print; gpu.jsonl, trace_BATCH.json.gz of each model,
# and kernels.csv.gz of bench/kernels.py. --device=cpu tries this script where there is no GPU, with small numbers.
set -u

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
MOST_SECONDS=${MOST_SECONDS:-525} # of all parts; a part that does not end at its limit is killed 5 s later
MOST_BYTES=400000 # of what a part prints that are kept
MOST_LINES=60 # of a part in the summary

fail() { # MESSAGE
    echo "error: $1" >&2
    exit 2
}

note() { # LINE...: on the screen and in the summary
    printf '%s\n' "$@" | tee -a "$OUT/summary.txt"
}

part() { # NAME SECONDS PATTERN COMMAND...: runs a part; lines that match the pattern go to the summary
    local name=$1 limit=$2 pattern=$3 begin=$SECONDS status=0 said=ok
    shift 3
    [ "$limit" -le $((MOST_SECONDS - SECONDS)) ] || limit=$((MOST_SECONDS - SECONDS))
    if [ "$limit" -lt 5 ]; then
        note "" "== $name: not begun, the time is over"
        return
    fi
    # SIGINT lets pytest tell what has failed so far
    timeout --signal=INT --kill-after=5 "$limit" "$@" >"$TEMPORARY/part" 2>&1 </dev/null || status=$?
    case $status in
    0) ;;
    124 | 137) said="stopped at its limit" ;;
    *) said="ended with status $status" ;;
    esac
    {
        printf '\n==== %s:' "$name"
        printf ' %q' "$@"
        printf '\n'
        tail -c "$MOST_BYTES" "$TEMPORARY/part"
    } >>"$OUT/log.txt"
    note "" "== $name: $said, $((SECONDS - begin)) s of at most $limit"
    grep -aE "$pattern" "$TEMPORARY/part" | head -n "$MOST_LINES" | cut -c 1-200 | tee -a "$OUT/summary.txt"
}

bench() { # NAME SECONDS PATTERN PROGRAM FLAG...: a part that is a program in bench/
    local program=$4
    if [ -f "$ROOT/bench/$program" ]; then
        part "$1" "$2" "$3" "$PYTHON" -u "$ROOT/bench/$program" "${@:5}"
    else
        note "" "== $1: there is no bench/$program"
    fi
}

tests() { # runs the tests that a GPU takes part in, by several workers if pytest can
    local words=(-q --tb=short -p no:cacheprovider -rfE)
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then words+=(-n "$WORKERS" --dist worksteal); fi
    part tests 110 '^(FAILED|ERROR|[0-9]+ (passed|failed|skipped|error)|=+ .* in [0-9.]+s)|No module named' \
        "$PYTHON" -m pytest "${words[@]}" test/unit/devices/test_gpu.py test/unit/devices/test_triton_*.py \
        test/unit/devices/test_large_tables.py
}

OUT='' DEVICE=cuda
for word in "$@"; do
    case $word in
    --device=cuda) ;;
    --device=cpu) DEVICE=cpu ;;
    -*) fail "$word: expected --device=cpu, or a folder" ;;
    *) OUT=$word ;;
    esac
done
OUT=${OUT:-first_hour}
command -v timeout >/dev/null || fail "there is no timeout, a program of coreutils"
"$PYTHON" -c 'import torch' 2>/dev/null || fail "$PYTHON cannot import torch: PYTHON=... names another Python"
mkdir -p "$OUT" || fail "cannot make $OUT"
OUT=$(cd "$OUT" && pwd) || exit 2
rm -f "$OUT"/{summary.txt,log.txt,gpu.jsonl,trace_*.json.gz}
TEMPORARY=$(mktemp -d) || fail "no folder for what is temporary"
trap 'rm -rf "$TEMPORARY"' EXIT
cd "$ROOT" || exit 2

if [ "$DEVICE" = cuda ]; then
    CARD=(--use-gpu --amp=bf16 --cuda-graphs) SIZES=() KERNELS=() QUALITY=(--rows=3000000 --seeds=3) WORKERS=4
else
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # other programs may use the cores
    SIZES=(--only=2048 --rows=20000 --rows-a-line=2048 --most-table-rows=2000)
    CARD=() KERNELS=(--small) QUALITY=(--rows=6000 --seeds=2) WORKERS=2
fi
GPU=("--device=$DEVICE" "--out=$OUT" "--data=$TEMPORARY" "${SIZES[@]}")

note "first hour, $(date -u '+%Y-%m-%d %H:%M') UTC, device $DEVICE"
bench machine 30 . machine.py
part self-check 60 '^(device|CUDA|driver|[0-9]+ steps|as on|PASS|FAIL|error)' \
    "$PYTHON" dlrm_s_pytorch.py --self-check "${CARD[@]}"
tests
bench speed 145 '^(GPU| )|rror' gpu.py "${GPU[@]}" --parts=program,steps,replay,loader,summed
bench kernels 90 '^(torch|copies|interpreted|    [A-Z])| all (kernels|products) | both  |us less|failed|skipped|rror' \
    kernels.py "--device=$DEVICE" --out "$OUT" "${KERNELS[@]}"
bench profiles 60 '^profile|a replay takes|failed|rror' gpu.py "${GPU[@]}" --parts=profile
bench 'roofline and yardstick' 75 '^(roofline|  floor|  both|  yard)|failed|rror' \
    gpu.py "${GPU[@]}" --parts=roofline,yardstick
bench quality 150 . quality.py "--device=$DEVICE" "${QUALITY[@]}"
note "" "$SECONDS s in all; files: $(cd "$OUT" && echo *)"
