ARG OLLAMA_IMAGE=ollama/ollama:0.34.4
