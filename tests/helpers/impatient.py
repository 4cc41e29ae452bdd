"""A service that soon tells of who waits for Ollama in vain."""

from helpers.answers import GEMMA

STUCK_S = 20
VERDICT_S = STUCK_S + 70  # each sign of work begins the count anew


def impatient(make_service, gguf):
    """Return what makes one, with settings of one's own."""
    return lambda **env: make_service(
        models={GEMMA: gguf},
        LLM_MODEL=GEMMA,
        LLM_STUCK_SECONDS=STUCK_S,
        LLM_CONTEXT_LENGTH=2048,
        **env,
    )


def health(service):
    return service.get("/health").json()
