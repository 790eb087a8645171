# Sourced by common.sh: the folder of each run, the links that lead to the newest run's files, the bar.
# shellcheck shell=bash

begin_run() { # sets RUN and begins its logs: a new folder, or that of the run whose checkpoints are continued
    local name='' rank
    RUN=$(extra_value --run-dir)
    if [ -n "$RUN" ]; then
        [[ $RUN == /* ]] || RUN=$CALLED_FROM/$RUN
        RUN_LINK=$RUN
    else
        [ -z "$GOES_ON" ] || name=$(cat "$CHECKPOINTS.run" 2>/dev/null)
    fi
    [[ $name == *_"$CASE" && $name != */* ]] || name=$(date +%Y%m%d-%H%M%S)_$CASE
    if [ -z "$RUN" ]; then
        RUN=$OUTPUT/runs/$name RUN_LINK=runs/$name
        FLAGS+=(--run-dir="$RUN")
    fi
    mkdir -p "$RUN" "$OUTPUT/tensorboard" || fail "cannot write to $RUN"
    [ -z "$CHECKPOINTS" ] || { mkdir -p "${CHECKPOINTS%/*}" && echo "$name" >"$CHECKPOINTS.run"; } || fail "cannot write to $OUTPUT"
    remove_logs
    begin_log "$RUN/${KIND}_$FIRST_RANK.log"
    rm -f "${LOGS}"_*.log
    for ((rank = FIRST_RANK; rank < FIRST_RANK + NPROC; rank++)); do link "${KIND}_$rank.log"; done
    if is_elsewhere; then link launcher.log "launcher_node$NODE_RANK.log"; else link launcher.log; fi
    link_board "${name#*_}_${name%%_*}"
}

remove_logs() { # those of an earlier run in this folder, which machines may share: none that another machine writes now
    local log rank
    for log in "$RUN/$KIND"_[0-9]*.log; do
        rank=${log%.log} rank=${rank##*_}
        if [[ $rank -gt $FIRST_RANK && $rank -lt $((FIRST_RANK + NPROC)) ]] || { ! is_elsewhere && [ "$rank" -ge $((NNODES * NPROC)) ]; }; then
            rm -f "$log"
        fi
    done
}

begin_log() { # LOG: the lowest rank's has the whole run, for the results; an error of before would be taken for a new one
    if [ -z "$GOES_ON" ]; then
        : >"$1"
        return
    fi
    [ -e "$1" ] || cat "${LOGS}_0.log" >"$1" 2>/dev/null # of a run that had another folder, or none
    sed -i '/^error: /d' "$1"
}

link() { # NAME [ITS_NAME_THERE]: where users look for logs and results there is a link to the newest run's
    ln -sfn "$RUN_LINK/${2:-$1}" "$OUTPUT/$1" || fail "cannot write to $OUTPUT"
}

link_board() { # NAME: TensorBoard shows all runs of a folder by their names
    local folder=$RUN_LINK
    [[ " ${EXTRA[*]}" =~ \ --tensor[-_]board[-_]filename ]] && return
    [[ $folder == /* ]] || folder=../$folder
    ln -sfn "$folder/tensorboard" "$OUTPUT/tensorboard/$1" || fail "cannot write to $OUTPUT"
}

leave_report() { # the run's report, beside the picture in the caller's folder
    local partial=$CALLED_FROM/DLRM.html.partial
    [ -e "$RUN/report.html" ] || return 0
    cp "$RUN/report.html" "$partial" && mv "$partial" "$CALLED_FROM/DLRM.html"
}

follow_log() { # FIRST_LINE: shows the lowest rank's log until the launcher has ended; on a terminal with a bar below
    local log=$RUN/${KIND}_$FIRST_RANK.log
    trap '' INT # Ctrl-C is for the ranks: what they save then is shown
    [ -t 1 ] || exec tail -n "+$1" -f --pid="$LAUNCHER" "$log"
    cd "$ROOT" && exec "$PYTHON" -m reporting.follow_log "$log" --from-line="$1" --pid="$LAUNCHER"
}
