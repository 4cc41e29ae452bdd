#!/usr/bin/env bash
# Runs the management API and, beside it, `ollama serve`. First it installs what is missing of either.
#   ./start.sh                         runs the service; the README lists its settings
#   ./start.sh --setup [FILE…]         only installs, these requirement files too; prints where Python and Ollama are
#   ./start.sh --setup-python [FILE…]  the same without Ollama
set -euo pipefail
trap 'exit 0' TERM INT HUP # being stopped is no failure, however early

say() { printf 'llm-service: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }
alive() { kill -0 "$@" 2>/dev/null; } # whether any of these processes is there
now() { read -r now _ </proc/uptime && now=${now/./}; } # hundredths of a second; other clocks are set, and jump
exec 7<> <(:); nap() { read -rt "$1" -u 7 || :; } # SECONDS: without a program, as a wait of many naps would start many
wait_while() { # SECONDS COMMAND…: as long as it succeeds, but no longer; whether it has failed in time
    local now until; now; until=$((now + $1 * 100)) # a nap takes longer on a busy machine
    while "${@:2}"; do now; ((now < until)) || return 1; nap 0.02; done
}

# --- Install ---
run() { # COMMAND…: one that a signal to this script interrupts, with all that it has started
    setsid setpriv --pdeathsig TERM "$@" 9>&- &
    running=$!; wait "$running" && running=''
}
# shellcheck disable=SC2329 # a trap calls it; again, as a signal between a fork and its exec is lost
end_run() { for _ in {1..99}; do pkill -s "$running" -r D,R,S,T,t || return 0; nap 0.02; done; } 2>/dev/null

need_python() { # sets `python`
    venv=$cache/venv-$(cat requirements.txt "${files[@]}" | sha256sum | head -c 12)
    python=${LLM_VENV:-$venv}/bin/python
    # The import fails where an upgrade of the system's Python has left the packages behind
    if [[ -n ${LLM_VENV:-} || -e $venv/.complete ]] && "$python" -c 'import gunicorn' 2>/dev/null; then return; fi
    [[ -z ${LLM_VENV:-} ]] || die "LLM_VENV is ${LLM_VENV@Q}; it takes a virtual environment with the requirements"
    run .install/python.sh "$venv" "${files[@]}" >&2
}

need_ollama() { # sets `ollama`
    ollama=$(type -P ollama) && return
    version=$(sed -n 's/^ARG OLLAMA_IMAGE=.*:\([0-9.]*\).*/\1/p' Dockerfile)
    ollama=$cache/ollama-$version/bin/ollama
    [[ -x $ollama ]] || run .install/ollama.sh "$version" "$cache/ollama-$version" "$python" >&2 ||
        die 'no Ollama (see above): install it, https://ollama.com/download, and start again'
}

# --- Launch and keep: with few programs, as each takes its time to begin where others have the CPU ---
started_at() { # PID: sets `ticks`, its start after boot; 0 where it is not there
    local about=''; ticks=0
    { read -rd '' about <"/proc/$1/stat"; } 2>/dev/null || :
    [[ ! $about =~ .*\)(\ [^ ]+){19}\ ([0-9]+) ]] || ticks=${BASH_REMATCH[2]} # the name before may hold anything
}
keep_spare() { [[ -e $state.spare ]] || head -c 16384 /dev/zero >"$state.spare" || rm -f "$state.spare"; } 2>/dev/null
note() { { { tail -n 9 "$1" || :; echo "$record"; } >"$1.new" && mv "$1.new" "$1"; } 2>/dev/null; } # STATE: in one step

launch() { # STATE COMMAND…: prints to 5 and 6; in a session of its own, by which what it leaves is known
    setsid setpriv --pdeathsig TERM "${@:2}" >&5 2>&6 5>&- 6>&- 7>&- 9>&- &
    started_at $!; record="$! $ticks $restarts"
    note "$1" || { rm -f "$state.spare" && mkdir -p "${1%/*}" && note "$1"; } || say "cannot write $1 for the API"
}

kill_sessions() { [[ -n $1 ]] && pkill -KILL -s "${1%,}" -r D,R,S,T,t; } # SESSION,…: whether any lived; no zombies
end_sessions() { # STATE…: SIGKILL to all that is left of the sessions recorded there, even where their leader is dead
    local pid started ticks sessions=''; left=''
    while read -r pid started _; do
        started_at "$pid"; [[ $ticks != 0 && $ticks != "$started" ]] || sessions+=$pid, # else it is a stranger's now
    done < <(cat "$@" 2>/dev/null)
    wait_while 1 kill_sessions "$sessions" && return
    for pid in ${sessions//,/ }; do ! kill_sessions "$pid" || left+=$pid,; done
}
end_left() { while kill_sessions "$left"; do nap 1; done; } # what outlives that
ended_by_api() { # PID: whether the API has said so, by a pipe, as a disk may be full
    local pid said=''
    while read -rt 0.01 -u 8 pid; do said+=" $pid"; done
    [[ " $said " == *" $1 "* ]]
}

keep_ollama() { # as long as the API lives
    local pauses=(0.5 1 2 4 8 10) pause=0 deaths=() now server reader born status reason
    # Access lines of what the API asks every few seconds, which would fill the log
    local asked='^\[GIN\] .* \| 200 \| .* \| +(127\.0\.0\.1|::1) \| GET +"/api/(ps|version|tags)"$'
    while alive "$api"; do
        exec 5> >(exec 8>&- 9>&-; LC_ALL=C exec grep --line-buffered -aEv "$asked") \
            6> >(exec 5>&- 8>&- 9>&- "$python" -IS llm_service/messages.py "$state")
        reader=$! status=0
        keep_spare
        launch "$state" env "${settings[@]}" "$ollama" serve 8>&-
        now; server=$! born=$now; exec 5>&1 6>&2
        # Asked each time, as `wait -n` does not see what ended earlier
        while alive "$api" && alive "$server"; do wait -n "$api" "$server" 2>/dev/null || true; done
        alive "$api" || return 0
        wait "$server" 2>/dev/null || status=$?
        end_sessions "$state" # runners outlive their server, and hold the GPU's memory
        [[ -z $left ]] || { say "processes of Ollama do not end yet (sessions ${left%,})"; end_left 9>&- & }
        restarts=$((restarts + 1))
        ! ended_by_api "$server" || { say 'the API ended Ollama; starting it again'; continue; }
        wait_while 1 alive "$reader" || : # it writes down the reason
        now; ((now - born < 6000)) || pause=0
        deaths=("$now" "${deaths[@]:0:4}")
        reason="status $status: $(grep -s . "$state.reason" || echo 'no reason given')"
        ((${#deaths[@]} < 5 || now - deaths[4] >= 6000)) || die "Ollama ended five times in a minute, with $reason"
        say "Ollama ended with $reason; starting it again in ${pauses[pause]} s"
        run sleep "${pauses[pause]}" || true
        pause=$((pause < 5 ? pause + 1 : 5))
    done
}

# --- End ---
# shellcheck disable=SC2046,SC2329 # process numbers; a trap calls it
stop() { # within 10 s, whatever hangs; the exit status stays
    set +e; trap '' TERM INT HUP
    end_run
    exec 2>/dev/null 5>&- 6>&- # without what bash tells of processes that were killed
    kill "$api" # first: with its pulls closed, Ollama keeps what it has of their parts
    wait_while 1 alive "$api"
    kill $(jobs -p)
    wait_while 6 alive $(jobs -p)
    end_sessions "$state" "$state.api"
    wait_while 1 alive $(pgrep -P $$) # the readers of what Ollama prints
    rm -f "$state"*
}

# --- The start itself ---
[[ $# == 0 || $1 =~ ^--setup(-python)?$ ]] || die "unknown argument ${1@Q}: there are --setup and --setup-python [FILE…]"
[[ $# == 0 ]] || trap 'exit 130' TERM INT HUP
type -P flock setsid setpriv pkill >/dev/null || die 'programs are missing: apt-get install util-linux procps'
cd "$(dirname "$(realpath "$0")")"
export HOME=${HOME:-~}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/llm-service files=("${@:2}") ollama='' api='' running='' restarts=0 status=0
trap end_run EXIT
{ mkdir -p "$cache/run" && [[ -w $cache/run ]]; } 2>/dev/null ||
    die "cannot write to $cache: set XDG_CACHE_HOME to a folder that can be written to"
need_python
if [[ ${1:-} == --setup* ]]; then
    [[ $1 == --setup-python ]] || need_ollama
    printf '%s\n' "$python" ${ollama:+"$ollama"}
    exit
fi

port=${LLM_API_PORT:-11435}
state=$cache/run/${port//[!0-9]/}.state lock=$cache/run/${port//[!0-9]/}.lock # app.py says if that is no port
exec 5>&1 6>&2 8<> <(:) 9>>"$lock"
flock -n 9 || die "another start.sh runs the API on port $port: stop it, or set LLM_API_PORT" \
    "$(sed 's/.*/(it is &)/' "$cache/install.progress" 2>/dev/null)"
# What a killed launcher left; process numbers only count within one boot and one container
boot="$(</proc/sys/kernel/random/boot_id) $(readlink /proc/self/ns/pid)"
if [[ $(<"$lock") == "$boot" ]]; then end_sessions "$state" "$state.api"; fi
rm -f "$state"*
echo "$boot" >"$lock"
trap stop EXIT
export LLM_STATE_FILE=$state LLM_ENDED_FD=8
MALLOC_ARENA_MAX=2 launch "$state.api" "$python" -m gunicorn app:app # else glibc keeps memory per thread
api=$!
# app.py checks all settings; what gunicorn.conf.py writes of Ollama's is for `env`
while [[ ! -e $state.env ]] && alive "$api"; do nap 0.05; done
if mapfile -t settings 2>/dev/null <"$state.env"; then # else the API has ended
    need_ollama
    say "starting $ollama"
    keep_ollama
fi
wait "$api" 2>/dev/null || status=$?
((status == 1)) || say "the API ended with status $status" # with 1 it has said why
exit "$status"
