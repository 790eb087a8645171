# The scripts beside this file source it: set-up, options, devices, launching ranks, results.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CALLED_FROM=$PWD
TESTED_TORCH=2.13.0 # it is installed if there is no torch; requirements.txt has the versions that work
DEMO_DATA=$ROOT/test/demo_data
USAGE="options: --data_path=DIR | --demo, --device=npu|gpu|cpu, --device_id=N, --nproc=N, --batch_size=N, --fresh, --nnodes=N --node_rank=R --master_addr=ADDR --master_port=PORT, -- FLAGS OF dlrm_s_pytorch.py"
MAX_RESTARTS=${MAX_RESTARTS:-3} # from the last checkpoint, when a rank was killed
SECONDS_TO_SAVE=600             # that ranks are given when they are asked to end
export TORCH_DEVICE_BACKEND_AUTOLOAD=0 # a broken CANN must not keep torch from being imported

fail() { # MESSAGE [STATUS]
    echo "error: $1" >&2
    exit "${2:-2}"
}

# shellcheck source=test/run_folder.sh
source "$ROOT/test/run_folder.sh"
# shellcheck source=test/machines.sh
source "$ROOT/test/machines.sh"

# ---------------------------------------------------------------- set-up

missing_packages() { # PYTHON REQUIREMENTS_FILE...: prints what that Python lacks
    "$1" "$ROOT/test/missing_packages.py" "${@:2}" 2>/dev/null
}

find_python() { # prints the first Python of a version that works
    local candidate
    for candidate in python3 python3.12 python3.11 python3.13 python3.10 python3.14; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

fail_without_python() {
    fail "no Python 3.10 to 3.14 found; python3 is $(python3 --version 2>&1)"
}

set_up() { # REQUIREMENTS_FILE...: sets PYTHON to one that has what they ask for
    local own venv=$ROOT/.venv missing system=()
    own=$(find_python) || fail_without_python
    if missing=$(missing_packages "$own" "$@") && [ -z "$missing" ]; then
        PYTHON=$own
        return
    fi
    PYTHON=$venv/bin/python
    if ! "$PYTHON" -c '' 2>/dev/null; then
        echo "Setting up $venv (once)" >&2
        "$own" -c 'import torch' 2>/dev/null && system=(--system-site-packages)
        "$own" -m venv --clear "${system[@]}" "$venv" || fail "cannot make $venv with $own (is its venv module installed?)"
    fi
    missing=$(missing_packages "$PYTHON" "$@")
    [ -z "$missing" ] && return
    echo "Installing: ${missing//$'\n'/, }" >&2
    install_packages "$missing" || fail "pip could not install what is missing (its message is above)"
    missing=$(missing_packages "$PYTHON" "$@")
    [ -z "$missing" ] || fail "$venv still lacks ${missing//$'\n'/, }: delete it and try again"
}

look_for_torch_npu() { # fails if no Python here has it, before a torch is installed that may not go with CANN
    local own python
    own=$(find_python) || fail_without_python
    for python in "$own" "$ROOT/.venv/bin/python"; do
        has_torch_npu "$python" && return
    done
    PYTHON=$own source_cann # it names the pairs
    fail "--device=npu: torch_npu is not installed beside torch 2.6 or newer in $own: install a pair that goes with CANN (docs/npu.md)"
}

has_torch_npu() { # PYTHON
    "$1" - "$ROOT" 2>/dev/null <<'PY'
import sys

sys.path.insert(0, sys.argv[1])
from devices.npu_pairs import has_torch_npu

sys.exit(not has_torch_npu())
PY
}

install_packages() { # LINES: torch first, and a version that is tested, or pip takes the newest
    local packages
    mapfile -t packages <<<"$1"
    if grep -q '^torch[^_]' <<<"$1"; then
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "torch==$TESTED_TORCH" >&2 || return 1
    fi
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "${packages[@]}" >&2
}

# ---------------------------------------------------------------- options

parse_options() { # DEFAULT_NPROC ARGUMENT...
    FRESH='' DATA_PATH='' DEMO='' DEVICE='''' DEVICE_ID=0 NPROC=$1 BATCH_SIZE='' EXTRA=()
    NNODES='' NODE_RANK='' MEET_ADDR='' MEET_PORT=''
    shift
    local flag value
    while [ $# -gt 0 ]; do
        flag=${1%%=*} value=${1#*=}
        case $1 in
        --) EXTRA=("${@:2}") && break ;;
        --help | -h) echo "$USAGE" && exit 0 ;;
        --demo) DEMO=1 && shift && continue ;;
        --fresh) FRESH=1 && shift && continue ;;
        --*=*) shift ;;
        --*) value=${2-} && shift && [ $# -gt 0 ] && shift ;;
        *) fail "unexpected argument $1; $USAGE" ;;
        esac
        [ -n "$value" ] || fail "$flag wants a value; $USAGE"
        case ${flag//-/_} in
        __data_path) DATA_PATH=$value ;;
        __device) DEVICE=$value ;;
        __device_id) DEVICE_ID=$value ;;
        __nproc) NPROC=$value ;;
        __batch_size) BATCH_SIZE=$value ;;
        __nnodes) NNODES=$value ;;
        __node_rank) NODE_RANK=$value ;;
        __master_addr) MEET_ADDR=$value ;;
        __master_port) MEET_PORT=$value ;;
        *) fail "unknown option $flag; $USAGE" ;;
        esac
    done
    take_batch_size
    check_options
}

take_batch_size() { # sets BATCH_SIZE to a --mini-batch-size after --: names and figures need it
    local value
    value=$(extra_value --mini-batch-size)
    BATCH_SIZE=${value:-$BATCH_SIZE}
}

extra_value() { # FLAG: prints the value that it has after --, if it stands there
    local k value=''
    for k in "${!EXTRA[@]}"; do
        case ${EXTRA[k]//_/-} in
        "$1"=*) value=${EXTRA[k]#*=} ;;
        "$1") value=${EXTRA[k + 1]-} ;;
        esac
    done
    echo "$value"
}

has_extra() { # FLAG...: does one of them stand after --, with or without a value?
    local word
    for word in "${EXTRA[@]%%=*}"; do
        [[ " $* " != *" ${word//_/-} "* ]] || return 0
    done
    return 1
}

check_options() {
    [ -n "$DATA_PATH$DEMO" ] || fail "no data: give --data_path=DIR (day_0, day_1, ... or train.txt) or --demo"
    [ -z "$DATA_PATH" ] || [ -z "$DEMO" ] || fail "--data_path and --demo: give one of them"
    case $DEVICE in '' | npu | gpu | cpu) ;; *) fail "--device=$DEVICE: expected npu, gpu or cpu" ;; esac
    [[ $DEVICE_ID =~ ^[0-9]+$ ]] || fail "--device_id=$DEVICE_ID: expected a whole number"
    [[ $NPROC =~ ^[1-9][0-9]*$ ]] || fail "--nproc=$NPROC: expected a whole number of at least 1"
    [[ ${BATCH_SIZE:-1} =~ ^[1-9][0-9]*$ ]] || fail "--batch_size=$BATCH_SIZE: expected a whole number of at least 1"
    check_machines
    if [ -n "$DATA_PATH" ]; then
        [ -d "$DATA_PATH" ] || fail "--data_path=$DATA_PATH: no such folder"
        DATA_PATH=$(cd "$DATA_PATH" && pwd) || exit 2
    fi
}

# ---------------------------------------------------------------- devices

count_cards() { # npu|cuda...: prints how many cards torch finds of each kind; 0 if it cannot look
    "$PYTHON" - "$ROOT" "$@" 2>/dev/null <<'PY'
import sys

sys.path.insert(0, sys.argv[1])
from devices.card import count_cards
from devices.npu import import_torch_npu

for kind in sys.argv[2:]:
    try:
        if kind == "npu":
            import_torch_npu()
        print(count_cards(kind))
    except Exception:
        print(0)
PY
}

choose_device() { # sets DEVICE: npu, else gpu, else cpu; the demo takes the cpu
    local cards found=()
    [ "$DEVICE" = npu ] && source_cann
    [ -z "$DEVICE" ] && [ -n "$DEMO" ] && DEVICE=cpu
    [ "$DEVICE" = cpu ] && return
    if [ -z "$DEVICE" ]; then
        find_cann && source_cann
        mapfile -t found < <(count_cards cuda npu)
        if [ "${found[1]:-0}" -gt 0 ]; then DEVICE=npu; elif [ "${found[0]:-0}" -gt 0 ]; then DEVICE=gpu; else DEVICE=cpu; fi
        echo "Training on: $DEVICE" >&2
        case $DEVICE in npu) cards=${found[1]} ;; gpu) cards=${found[0]} ;; cpu) return ;; esac
    else
        cards=$(count_cards "${DEVICE/gpu/cuda}")
    fi
    [ "${cards:-0}" -gt 0 ] || return 0 # the program's own check says what it looked for
    [ "$cards" -ge "$NPROC" ] || fail "$NPROC ranks want $NPROC cards, found $cards ($DEVICE): give --nproc=$cards or --device cpu"
}

find_cann() { # is a CANN set_env.sh here, even if CANN is incomplete? test/env_npu.sh looks for it
    # shellcheck source=test/env_npu.sh
    (source "$ROOT/test/env_npu.sh" || [ -n "$CANN_FOLDER" ]) >/dev/null 2>&1
}

source_cann() {
    # shellcheck source=test/env_npu.sh
    source "$ROOT/test/env_npu.sh" || true # it says what is missing; with --use-npu the program then ends
}

# ---------------------------------------------------------------- data and flags

make_demo_data() { # writes the demo's day files, once
    if [ ! -f "$DEMO_DATA/day_0" ]; then
        (
            set -o pipefail
            ! command -v flock >/dev/null || flock 9 # machines may share the folder
            [ -f "$DEMO_DATA/day_0" ] || "$PYTHON" "$ROOT/data_utils.py" --make-demo="$DEMO_DATA" | tee "$DEMO_DATA.txt"
        ) 9>>"$ROOT/test/output/demo.lock" || exit 2
    fi
    DATA_PATH=$DEMO_DATA
}

data_kind() { # prints terabyte, kaggle or demo; raw or prepared data tells
    local kaggle=("$DATA_PATH"/train.txt* "$DATA_PATH"/kaggleAdDisplayChallenge_processed*)
    if [ -n "$DEMO" ]; then
        echo demo
    elif [[ " ${EXTRA[*]}" =~ \ --data[-_]set[=\ ](kaggle|terabyte) ]]; then
        echo "${BASH_REMATCH[1]}"
    elif [ -e "$DATA_PATH/day_0" ] || [ -e "$DATA_PATH/day_0.gz" ]; then
        echo terabyte
    elif [ -e "${kaggle[0]}" ] || [ -e "${kaggle[1]}" ]; then
        echo kaggle
    else
        echo terabyte
    fi
}

set_flags() { # sets FLAGS, BATCH_SIZE and CASE: the published model, changed as the data wants it
    local kind
    kind=$(data_kind)
    FLAGS=(--data_path="$DATA_PATH" --memory-map --dataset-multiprocessing --loss-function=bce --round-targets=true
        --test-mini-batch-size=16384 --mlperf-logging --print-time)
    if [ "$kind" = kaggle ]; then
        FLAGS+=(--arch-sparse-feature-size=16 --arch-mlp-bot=13-512-256-64-16 --arch-mlp-top=512-256-1 --learning-rate=0.1)
    else
        FLAGS+=(--arch-sparse-feature-size=64 --arch-mlp-bot=13-512-256-64 --arch-mlp-top=512-512-256-1 --learning-rate=1)
    fi
    if [ "$kind" = demo ]; then
        echo "Demo: tables of at most 100,000 rows, batch ${BATCH_SIZE:-1024}, no sub-sampling; else the published model" >&2
        FLAGS+=(--max-ind-range=100000 --test-freq=100 --print-freq=20)
        BATCH_SIZE=${BATCH_SIZE:-1024}
    else
        FLAGS+=(--max-ind-range=10000000 --data-sub-sample-rate=0.875 --test-freq=10240 --print-freq=1024)
    fi
    if [ "$kind" = kaggle ]; then BATCH_SIZE=${BATCH_SIZE:-128}; else BATCH_SIZE=${BATCH_SIZE:-32768}; fi
    CASE=DLRM_bs${BATCH_SIZE}_${RANKS}p_${KIND/train/acc}
    FLAGS+=(--mini-batch-size="$BATCH_SIZE")
    [ "$DEVICE" = cpu ] || FLAGS+=("--use-$DEVICE")
    [ "$NPROC" -gt 1 ] || [ "$DEVICE" = cpu ] || FLAGS+=(--local_rank="$DEVICE_ID")
}

# ---------------------------------------------------------------- checkpoints

keep_checkpoints() { # sets CHECKPOINTS, unless the user has flags of their own
    CHECKPOINTS='' GOES_ON=''
    ! has_extra --checkpoint-dir --resume --load-model || return 0
    if [ "$NNODES" -gt 1 ]; then # only the user knows what all machines see
        echo "No checkpoints: -- --checkpoint-dir=DIR --save-minutes=5 --resume keeps them, in a DIR that all machines share" >&2
        return
    fi
    CHECKPOINTS=$OUTPUT/checkpoints/$CASE
    FLAGS+=(--checkpoint-dir="$CHECKPOINTS" --save-minutes=5 --resume)
}

look_for_checkpoints() { # goes on from what a failed run has left; removes what a finished one has left
    [ -n "$CHECKPOINTS" ] || return 0
    [ -z "$FRESH" ] && [ ! -e "$CHECKPOINTS/finished" ] || remove_checkpoints
    if has_checkpoint; then
        GOES_ON=1
        echo "Going on from the last checkpoint in $CHECKPOINTS (--fresh starts anew)" >&2
    fi
}

remove_checkpoints() { # the mark goes last: the next call removes the rest if this one is killed
    [ -d "$CHECKPOINTS" ] || return 0
    if ! { touch "$CHECKPOINTS/finished" && rm -rf "$CHECKPOINTS"/*-step-* && rm "$CHECKPOINTS/finished"; }; then
        fail "cannot remove the old checkpoints in $CHECKPOINTS"
    fi
}

has_checkpoint() {
    [ -n "$CHECKPOINTS" ] && compgen -G "$CHECKPOINTS/*-step-*" >/dev/null
}

mark_finished() { # tells what the checkpoints take, as nothing needs them any more
    touch "$CHECKPOINTS/finished"
    echo "Checkpoints: $CHECKPOINTS, $(du -sh "$CHECKPOINTS" | cut -f 1); remove them, or the next run of this command will"
}

# ---------------------------------------------------------------- launching

prepare() { # checks options, device and data, and prepares the data, in one process
    local command=("$PYTHON" "$ROOT/dlrm_s_pytorch.py" "${FLAGS[@]}" "${EXTRA[@]}" --dry-run)
    if has_extra --print-plan --help -h || is_dry_run; then # this machine answers alone
        ! has_extra --print-plan || [[ $(extra_value --print-plan) =~ ^[0-9] ]] || command+=(--print-plan="$RANKS")
        exec "${command[@]}"
    elif [ "$NNODES" -gt 1 ]; then
        check_flags
        meet_machines "${command[@]}"
    else
        "${command[@]}" || exit $?
    fi
}

is_dry_run() {
    local words=" ${EXTRA[*]} "
    [[ ${words,,} =~ \ --dry[-_]run(=true|=yes|=1)?\  ]]
}

launch() { # runs the ranks; each writes to train_<rank>.log (eval_, perf_) of the run, and the lowest one's lines are shown too
    local status=0 follower cores lines restarts=0
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / NPROC > 0 ? cores / NPROC : 1))} LOGS=$OUTPUT/$KIND
    begin_run
    lines=$(($(wc -l <"${LOGS}_$FIRST_RANK.log") + 1))
    set_meeting
    ! goes_on_by_itself || restarts=$MAX_RESTARTS
    # its own process group: Ctrl-C reaches this script alone, which passes it on once
    set -m
    # shellcheck disable=SC2016
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$SECONDS_TO_SAVE TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \
        "$PYTHON" -m torch.distributed.run --rdzv-backend=c10d --rdzv-id=dlrm "${MEETING[@]}" \
        --nproc_per_node="$NPROC" --max-restarts="$restarts" --no-python \
        bash -c 'exec "$@" >>"${LOGS}_$RANK.log" 2>&1' rank "${RANKS_MEET[@]}" \
        "$PYTHON" -u "$ROOT/dlrm_s_pytorch.py" "${FLAGS[@]}" "${EXTRA[@]}" >"$OUTPUT/launcher.log" 2>&1 &
    LAUNCHER=$!
    set +m
    trap 'stop_ranks INT 130' INT
    trap 'stop_ranks TERM 143' TERM
    trap 'stop_ranks HUP 129' HUP
    follow_log "$lines" &
    follower=$!
    wait "$LAUNCHER" || status=$?
    wait "$follower" 2>/dev/null
    trap - INT TERM HUP
    [ $status -eq 0 ] || report_failure
}

stop_ranks() { # SIGNAL STATUS: the launcher ends its ranks before it goes; a second signal lets them leave their save
    trap '' HUP
    trap 'pkill -TERM -P "$LAUNCHER" 2>/dev/null' INT TERM
    kill -TERM "$LAUNCHER" 2>/dev/null
    while kill -0 "$LAUNCHER" 2>/dev/null; do wait "$LAUNCHER" 2>/dev/null; done
    wait "$follower" 2>/dev/null # it shows what was saved
    remove_partial
    echo "stopped by SIG$1: all ranks have ended$(what_is_left)" >&2
    exit "$2"
}

what_is_left() {
    if has_checkpoint; then
        echo "; the same command goes on from the last checkpoint"
    fi
}

remove_partial() { # a rank removes its half-written files, unless SIGKILL ends it, as when memory is short
    is_elsewhere || rm -f "$CALLED_FROM"/{DLRM.pth,DLRM.vocabulary,DLRM.html,dlrm_s_pytorch.onnx{,.data}}.partial
}

ANOTHER_RANKS_FAULT='^error: .*: its own log says why$' # ranks/watch.py

report_failure() { # prints the error of the rank that failed, and the end of its log
    local log line
    remove_partial
    log=$(grep -l '^error: ' "$LOGS"_*.log 2>/dev/null | xargs -r -d '\n' grep -LE "$ANOTHER_RANKS_FAULT" | head -n 1)
    [ -n "$log" ] || log=$(grep -lE '^(\[rank[0-9]+\]: ?)?Traceback' "$LOGS"_*.log 2>/dev/null | head -n 1)
    [ -n "$log" ] || log=$(grep -l '^error: ' "$LOGS"_*.log 2>/dev/null | head -n 1) # that rank has left no word
    [ -n "$log" ] || ! others_have_ended || fail "ranks of other machines have ended: their scripts say why$(what_is_left)" 1
    [ -n "$log" ] || log=$OUTPUT/launcher.log
    echo "---- end of $log" >&2
    tail -n 15 "$log" >&2
    echo "----" >&2
    if line=$(grep '^error: ' "$log" | tail -n 1) && [ -n "$line" ]; then
        [[ $line != *" gives no sign of life "* ]] || line+=", or that machine's script was stopped"
        [[ $line != "error: --resume="* ]] || line+=" (this script: --fresh starts anew)"
        fail "${log##*/}: ${line#error: }" 1
    fi
    fail "training failed: see $log$(what_is_left)" 1
}

# ---------------------------------------------------------------- cases

begin_case() { # train|eval|perf DEFAULT_NPROC ARGUMENT...: does everything that comes before the ranks
    BEGAN=$SECONDS KIND=$1 CHECKPOINTS='' GOES_ON=''
    parse_options "${@:2}"
    [ "$DEVICE" != npu ] || look_for_torch_npu
    set_up "$ROOT/requirements.txt"
    choose_device
    OUTPUT=$ROOT/test/output/$DEVICE_ID
    ! is_elsewhere || OUTPUT+=/node$NODE_RANK # machines may share the folder
    mkdir -p "$OUTPUT" || fail "cannot write to $OUTPUT"
    keep_others_out
    [ -z "$DEMO" ] || make_demo_data
    set_flags
}

keep_others_out() { # logs and checkpoints have the same names in each run of a kind; the lock ends with the launcher
    local lock
    command -v flock >/dev/null || return 0
    exec {lock}>>"$OUTPUT/$KIND.lock" || fail "cannot write to $OUTPUT"
    flock -n "$lock" || fail "another run writes to $OUTPUT/${KIND}_*.log: wait for it, or give another --device_id"
}

finish_case() { # ARGUMENT...: result lines, results file; the arguments go to reporting/results.py
    if is_elsewhere; then
        leave_results_elsewhere
        exit 0
    fi
    (cd "$ROOT" && "$PYTHON" -m reporting.results "${LOGS}_0.log" --results="$RUN/$CASE.log" \
        --batch-size="$BATCH_SIZE" --ranks="$RANKS" --device="$DEVICE" --seconds=$((SECONDS - BEGAN)) "$@") || exit 1
    link "$CASE.log"
}

demo_auc() { # prints the Bayes AUC of the demo's rows
    local line
    line=$(grep 'Bayes AUC' "$DEMO_DATA.txt" 2>/dev/null)
    [[ $line =~ Bayes\ AUC\ ([0-9.]+) ]] && echo "${BASH_REMATCH[1]}"
}

train_full() { # DEFAULT_NPROC ARGUMENT...: train, leave DLRM.pth and DLRM.png in the caller's folder
    begin_case train "$@"
    FLAGS+=(--save-model="$CALLED_FROM/DLRM.pth")
    keep_checkpoints
    prepare
    look_for_checkpoints # after all flags are checked: a mistake in them removes nothing
    BEGAN=$SECONDS
    launch
    finish_case --plot="$CALLED_FROM/DLRM.png" ${DEMO:+--bayes-auc="$(demo_auc)"}
    leave_report
    [ -z "$CHECKPOINTS" ] || mark_finished
    [ -z "$DEMO" ] || grep 'Bayes AUC' "$DEMO_DATA.txt" 2>/dev/null
    echo "Model: $CALLED_FROM/DLRM.pth, picture: $CALLED_FROM/DLRM.png, report: $CALLED_FROM/DLRM.html, logs: $OUTPUT, run: $RUN"
}

steps_per_line() { # prints steps between lines: at least a second's worth, for the first line alone is warm-up
    local rows=131072 least=100
    [ "$DEVICE" != cpu ] || rows=32768 least=2
    echo $((rows / BATCH_SIZE > least ? rows / BATCH_SIZE : least))
}

train_performance() { # DEFAULT_NPROC ARGUMENT...: steady-state speed, no evaluation, no model
    begin_case perf "$@"
    FLAGS+=(--performance --print-freq="$(steps_per_line)" --nepochs=1000)
    prepare
    BEGAN=$SECONDS
    launch
    finish_case
}

evaluate() { # DEFAULT_NPROC ARGUMENT...: DLRM.pth of the caller's folder on the test rows
    begin_case eval "$@"
    FLAGS+=(--inference-only --load-model="$CALLED_FROM/DLRM.pth")
    prepare
    BEGAN=$SECONDS
    launch
    finish_case
}
