# With its registry, as podman asks no other by itself; docker-compose.yml names it, too
ARG OLLAMA_IMAGE=docker.io/ollama/ollama:0.34.4

FROM $OLLAMA_IMAGE AS base
# A new volume takes over the mode of .ollama: whoever is given by --user can then write to it
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends curl procps python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* \
    && chmod 755 /root && mkdir -p -m 1777 /root/.ollama

FROM base AS venv
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv
COPY requirements.txt /
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --only-binary=:all: -r /requirements.txt \
    && /opt/venv/bin/pip uninstall -q -y pip

# Compiled once, not by each new container at its start; in a stage of its own, so that it stays one layer
FROM venv AS app
COPY . /app
RUN /opt/venv/bin/python -m compileall -q /app

FROM base
COPY --from=venv /opt/venv /opt/venv
COPY --from=app /app /app
# HOME holds the models, whoever runs it; the numbers of processes go to /tmp, as the rest may be read-only
ENV HOME=/root XDG_CACHE_HOME=/tmp LLM_VENV=/opt/venv LLM_API_HOST=0.0.0.0
EXPOSE 11434 11435
# Ollama may take 300 s to start, so that failures count after 310 s only, or after the first success. From then on
# 24 in a row make it unhealthy. That is 2 minutes: a restart of Ollama with all its pauses (26 s) and a slow start
# (60 s) stay below; a service whose API is dead shows after them, and one whose API hangs after 24 * (4 + 5) s.
HEALTHCHECK --interval=5s --timeout=5s --start-period=310s --retries=24 \
    CMD curl -sS --fail-with-body -m 4 --noproxy '*' "http://127.0.0.1:${LLM_API_PORT:-11435}/health"
ENTRYPOINT ["/app/start.sh"]
