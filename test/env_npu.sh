# Makes CANN, Ascend's software for the NPU, usable in this shell: `source test/env_npu.sh`; the scripts do so themselves.
# Returns 1 if CANN is missing, incomplete or too old. Prints on stderr what is missing, which torch and torch_npu go with
# this CANN, and whether those of python3 ($PYTHON, if set) do.
# shellcheck shell=bash

# Seconds, 120 to 7200, that a rank waits for the others before their first exchange. CANN's default of 120 is short for
# ranks that fill large tables and compile operators first; torch_npu advises 300 or more.
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-600}
# All else stays as CANN and torch_npu have it. HCCL_EXEC_TIMEOUT: its half an hour is enough, and HCCL_EVENT_TIMEOUT would
# have to grow with it. TASK_QUEUE_ENABLE: its default, 1, is what torch_npu calls suitable for training (2: inference).
# PYTORCH_NPU_ALLOC_CONF=expandable_segments:True is for tensors whose sizes change; a step's stay the same.

first_cann() { # FOLDER...: sets CANN_FOLDER to the first with a set_env.sh; else empties it and returns 1
    for CANN_FOLDER; do
        [ ! -f "$CANN_FOLDER/set_env.sh" ] || return 0
    done
    CANN_FOLDER=''
    return 1
}

find_cann_folder() { # ROOT...: sets CANN_FOLDER as first_cann does
    local root places=()
    if [ -n "${ASCEND_HOME_PATH:-}" ]; then # older CANN sets it to .../latest and has set_env.sh beside that
        first_cann "$ASCEND_HOME_PATH" "${ASCEND_HOME_PATH%/latest}" && return
        echo "CANN: no set_env.sh in ASCEND_HOME_PATH=$ASCEND_HOME_PATH: looking elsewhere" >&2
    fi
    for root; do
        places+=("$root"{/cann,/ascend-toolkit,/ascend-toolkit/latest,/nnae,})
    done
    first_cann "${places[@]}"
}

source_set_env() { # without arguments: set_env.sh would see them
    local - # the caller's `set -u` and `set -e` come back on return, whatever set_env.sh does
    set +u  # it reads variables that may be unset
    # shellcheck disable=SC1091
    source "$CANN_FOLDER/set_env.sh" || true # || keeps `set -e` from ending the shell; what came of it is looked at below
}

lacking_libraries() { # LIBRARY...: prints those that are in no folder of LD_LIBRARY_PATH
    local library folder folders
    IFS=: read -ra folders <<<"${LD_LIBRARY_PATH:-}"
    for library; do
        for folder in "${folders[@]}"; do
            [ ! -f "$folder/$library" ] || continue 2
        done
        echo "$library"
    done
}

say_pairs() { # says which torch and torch_npu go with this CANN; returns 1 if CANN is too old for any
    local python=${PYTHON:-python3} root status=0
    root=$(dirname "${BASH_SOURCE[0]}")/..
    command -v "$python" >/dev/null || return 0
    "$python" -c 'import runpy, sys
if sys.version_info >= (3, 8):
    sys.path.insert(0, sys.argv.pop(1))
    runpy.run_module("devices.npu_pairs", None, "__main__", True)' \
        "$root" "$CANN_FOLDER" "$CANN_FOLDER/latest" || status=$?
    [ $status -ne 3 ] # devices/npu_pairs.py: the CANN is too old
}

look_for_driver() { # FOLDER: says if there is no driver; a container may have npu-smi alone
    [ -d "$1" ] || command -v npu-smi >/dev/null ||
        echo "CANN: the NPU's driver is not here (neither $1 nor npu-smi): no NPU can be used until it is installed" >&2
}

use_cann() { # INSTALL_INFO ROOT...: the file that may name one more root, and the roots, best first
    local installed under lacking roots=("${@:2}")
    installed=$(sed -n '/^Install_Path=/{s///p;q}' "$1" 2>/dev/null) || true
    [ -z "$installed" ] || roots+=("$installed")
    if ! find_cann_folder "${roots[@]}"; then
        printf -v under ', %s' "${roots[@]}"
        echo "CANN: not found: no cann, ascend-toolkit, ascend-toolkit/latest or nnae with a set_env.sh under ${under:2}:" \
            "install CANN or set ASCEND_HOME_PATH to its folder" >&2
        return 1
    fi
    source_set_env
    lacking=$(lacking_libraries libhccl.so libascendcl.so)
    if [ -z "$lacking" ]; then
        say_pairs
        return
    fi
    echo "CANN: incomplete: after $CANN_FOLDER/set_env.sh no folder of LD_LIBRARY_PATH has ${lacking//$'\n'/ or }:" \
        "install CANN again" >&2
    return 1
}

look_for_driver /usr/local/Ascend/driver
use_cann /etc/Ascend/ascend_cann_install.info /usr/local/Ascend "${HOME:-}/Ascend"
