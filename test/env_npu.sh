# The environment of Ascend's CANN, sourced by the scripts where an NPU is wanted. Gives 1 and says so where there is none.
# shellcheck shell=bash

cann_folders() { # where CANN may be, best first
    echo "${ASCEND_HOME_PATH:-}"
    local base name
    for base in /usr/local/Ascend "$HOME/Ascend" "$(sed -n 's/^Install_Path=//p' /etc/Ascend/ascend_cann_install.info 2>/dev/null)"; do
        for name in cann ascend-toolkit ascend-toolkit/latest nnae; do
            [ -n "$base" ] && echo "$base/$name"
        done
    done
}

source_first_cann() {
    local folder
    while read -r folder; do
        if [ -n "$folder" ] && [ -f "$folder/set_env.sh" ]; then
            set +u # set_env.sh reads variables that may be unset
            # shellcheck disable=SC1091
            source "$folder/set_env.sh"
            return
        fi
    done < <(cann_folders)
    echo "CANN is not here: no set_env.sh under ASCEND_HOME_PATH, /usr/local/Ascend or $HOME/Ascend" >&2
    return 1
}

export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-600} # seconds to wait for the other ranks to come up
export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-1}         # launch operators from a second thread
source_first_cann
