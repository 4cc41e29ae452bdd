# shellcheck shell=bash disable=SC2154
# For the scripts beside it: what they say, and that one installs at a time. They set `cache`, the folder that holds
# install.lock and install.progress, by which another start.sh says the same.

say() { printf 'llm-service: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }
tied() { setpriv --pdeathsig TERM "$@"; } # ends with this script, however that ends

tell() { # LINE: on a terminal in place of the line before, else every 15 s
    if [[ -t 2 ]]; then
        printf '\r\e[Kllm-service: %.*s' $((${COLUMNS:-80} - 15)) "$1" >&2
    elif ((SECONDS >= ${tell_at:-0})); then
        tell_at=$((SECONDS + 15))
        say "$1"
    fi
}

progress() { # STEPS WHAT…: the same for this terminal and for others
    local line
    line="installing, step $1, $SECONDS s so far, ${*:2}"
    echo "$line" >"$cache/install.progress.new"
    mv "$cache/install.progress.new" "$cache/install.progress"
    tell "$line"
}

take_lock() {
    exec 8>"$cache/install.lock"
    until flock -n 8; do
        tell "another start.sh is $(cat "$cache/install.progress" 2>/dev/null || echo 'installing: waiting for it')"
        sleep 1
    done
    trap 'rm -f "$cache"/install.progress*' EXIT
    trap 'exit 130' INT # pip makes an ordinary failure of it
}
