# Sourced by common.sh: which machines a run has, how they find one another, what the others are left with.
# shellcheck shell=bash disable=SC2034

SECONDS_TO_COME=1800       # that a machine waits for the others to come
SECONDS_TO_START_AGAIN=120 # that torchrun waits for the other machines when ranks start again

NNODES=1 NODE_RANK=0 FIRST_RANK=0 # unless options say otherwise

check_machines() { # sets RANKS and FIRST_RANK, the lowest one of this machine
    local missing=() given=$NODE_RANK$MEET_ADDR$MEET_PORT
    [[ ${NNODES:-1} =~ ^[1-9][0-9]{0,4}$ ]] || fail "--nnodes=$NNODES: expected a whole number from 1 to 99999"
    [ -n "$NNODES" ] || [ -z "$given" ] || fail "--node_rank, --master_addr and --master_port are for several machines: give --nnodes=N too"
    NNODES=${NNODES:-1}
    if [ "$NNODES" -gt 1 ]; then
        [ -n "$NODE_RANK" ] || missing+=("--node_rank=R (0 to $((NNODES - 1)), another one on each machine)")
        [ -n "$MEET_ADDR" ] || missing+=("--master_addr=ADDR (the machine with --node_rank=0)")
        [ -n "$MEET_PORT" ] || missing+=("--master_port=PORT (the same on all)")
        [ ${#missing[@]} -eq 0 ] || fail "--nnodes=$NNODES: give $(joined ', ' "${missing[@]}") too"
    fi
    NODE_RANK=${NODE_RANK:-0}
    [[ $NODE_RANK =~ ^(0|[1-9][0-9]{0,4})$ ]] && [ "$NODE_RANK" -lt "$NNODES" ] ||
        fail "--node_rank=$NODE_RANK: expected a whole number from 0 to $((NNODES - 1)), as --nnodes is $NNODES"
    [[ ${MEET_PORT:-1} =~ ^[1-9][0-9]{0,4}$ ]] && [ "${MEET_PORT:-1}" -lt 65535 ] ||
        fail "--master_port=$MEET_PORT: expected a port from 1 to 65534; the one after it is used too"
    RANKS=$((NNODES * NPROC)) FIRST_RANK=$((NODE_RANK * NPROC))
}

joined() { # SEPARATOR WORD...
    local words
    words=$(printf "$1%s" "${@:2}")
    echo "${words#"$1"}"
}

check_flags() { # of the program, before anybody waits for this machine
    "$PYTHON" - "$ROOT" "${FLAGS[@]}" "${EXTRA[@]}" <<'PY' || exit $?
import sys

sys.path[0] = sys.argv[1]
import dlrm_s_pytorch
from common.errors import reports_errors


def check(argv):
    dlrm_s_pytorch.parse_options(argv)
    return 0


sys.exit(reports_errors(check)(sys.argv[2:]))
PY
}

meet_machines() { # COMMAND...: runs it on all machines once all are here with the same options; ends unless it ends well on all
    local status=0
    # its own process group: Ctrl-C reaches this script alone, which ends it with all that it has started
    set -m
    (cd "$ROOT" && exec "$PYTHON" -m ranks.machines --nnodes="$NNODES" --node-rank="$NODE_RANK" \
        --master-addr="$MEET_ADDR" --master-port="$MEET_PORT" --seconds="$SECONDS_TO_COME" --folder="$CALLED_FROM" --parent=$$ \
        --same=--nproc="$NPROC" --same=--device="$DEVICE" --same=--demo="${DEMO:-no}" --same=script="$KIND" -- "$@") &
    MEETS=$!
    set +m
    trap 'stop_meeting INT 130' INT
    trap 'stop_meeting TERM 143' TERM
    trap 'stop_meeting HUP 129' HUP
    wait "$MEETS" || status=$?
    trap - INT TERM HUP
    [ $status -eq 0 ] || exit $status
}

stop_meeting() { # SIGNAL STATUS: nothing that this script has started goes on, or keeps the lock
    trap '' INT TERM HUP
    kill -TERM "$MEETS" 2>/dev/null
    wait "$MEETS"
    echo "stopped by SIG$1 before any rank has started" >&2
    exit "$2"
}

goes_on_by_itself() { # would ranks that start again go on from their last checkpoint?
    local folder path
    [ -z "$CHECKPOINTS" ] || return 0
    [ "$NNODES" -gt 1 ] && has_extra --checkpoint-dir && has_extra --resume || return 1
    folder=$(extra_value --checkpoint-dir) path=$(extra_value --resume)
    [[ -n $path && $path != --* && $path != "$folder" ]] || return 0
    echo "No restarts: --resume=$path begins there each time; --resume alone goes on from the newest in --checkpoint-dir" >&2
    return 1
}

set_meeting() { # sets MEETING, torchrun's arguments, and RANKS_MEET, the beginning of a rank's command
    local endpoint=$MEET_ADDR
    if [ "$NNODES" -eq 1 ]; then
        # a file, because torch's store listens at all addresses of the machine, whatever it is told
        RENDEZVOUS=$(mktemp) || fail "cannot make a file in ${TMPDIR:-/tmp}"
        trap 'rm -f "$RENDEZVOUS"' EXIT
        MEETING=(--rdzv-endpoint="$RENDEZVOUS" --rdzv-conf=store_type=file --local-addr=127.0.0.1)
        RANKS_MEET=()
        return
    fi
    [[ $endpoint != *:* ]] || endpoint="[$endpoint]"
    # torchrun numbers machines in the alphabetical order of what it takes for their addresses
    MEETING=(--nnodes="$NNODES" --rdzv-endpoint="$endpoint:$MEET_PORT"
        --rdzv-conf="is_host=$((NODE_RANK == 0)),join_timeout=$SECONDS_TO_START_AGAIN"
        --local-addr="$(printf 'machine%05d' "$NODE_RANK")")
    RANKS_MEET=(env MASTER_ADDR="$MEET_ADDR" MASTER_PORT=$((MEET_PORT + 1)))
}

others_have_ended() { # does torchrun say that it has waited for other machines in vain?
    [ "$NNODES" -gt 1 ] && grep -qE '^torch.*\.Rendezvous[A-Za-z]*Error' "$OUTPUT/launcher.log" 2>/dev/null
}

is_elsewhere() { # does another machine have rank 0, which prints, measures and saves?
    [ "$NODE_RANK" -gt 0 ]
}

leave_results_elsewhere() { # the last line of the other machines
    echo "Ranks $FIRST_RANK to $((FIRST_RANK + NPROC - 1)) have ended well. Results are on the machine with --node_rank=0 ($MEET_ADDR); logs: $OUTPUT, run: $RUN"
}
