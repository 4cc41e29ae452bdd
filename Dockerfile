ARG OLLAMA_IMAGE=ollama/ollama:0.34.4
# What compose passes on, which is empty where nothing else is asked for
ARG IMAGE=

FROM ${IMAGE:-$OLLAMA_IMAGE} AS base
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*

FROM base AS venv
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv
COPY requirements.txt /
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --only-binary=:all: -r /requirements.txt \
    && /opt/venv/bin/pip uninstall -q -y pip

FROM base
COPY --from=venv /opt/venv /opt/venv
COPY . /app
ENV LLM_VENV=/opt/venv LLM_API_HOST=0.0.0.0
EXPOSE 11434 11435
# Often, as the first check comes after an interval; in bash, as there is no curl and a Python costs twice as much.
HEALTHCHECK --interval=4s --timeout=5s --start-period=30s --retries=3 \
    CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/${LLM_API_PORT:-11435} && printf 'GET /health HTTP/1.0\\r\\n\\r\\n' >&3 && read -r -t 4 _ status _ <&3 && [[ $status == 200 ]]"]
ENTRYPOINT ["/app/start.sh"]
