"""A long answer under way, in a thread."""

import contextlib
import http.client
import json
import socket
import threading

from helpers.waiting import wait_for

# Counting is what the small model does for ever, whatever the context length.
PROMPT = " ".join(map(str, range(1, 15)))
ENDLESS = {"temperature": 0, "num_predict": 100_000}


class Generation:
    """A streamed answer of `model` on Ollama's `port`.

    .tokens     so far
    .done       it has ended: with .status (of HTTP) and .error (None if it ended well)
    .flowing()  waits for the first token
    .wait(s)    waits for the end
    .close()    leaves, as a client does that went away
    """

    def __init__(self, port, model, **options):
        self.tokens, self.done, self.status, self.error = 0, False, None, None
        body = {"model": model, "prompt": PROMPT, "raw": True, "options": {**ENDLESS, **options}}
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._thread = threading.Thread(target=self._run, args=(json.dumps(body),), daemon=True)
        self._thread.start()

    def _run(self, body):
        try:
            self._connection.request("POST", "/api/generate", body)
            response = self._connection.getresponse()
            self.status = response.status
            answer = {}
            for line in response:
                answer = json.loads(line)
                self.tokens += bool(answer.get("response"))
            self.error = answer.get("error") or (None if answer.get("done") else "cut off")
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.error = repr(error)
        finally:
            self.done = True

    def flowing(self):
        wait_for(lambda: self.tokens or self.done, 120, "the first token")
        assert not self.done, f"the generation ended: {self.status} {self.error}"
        return self

    def wait(self, timeout):
        self._thread.join(timeout)
        assert self.done, f"the generation did not end within {timeout} s"
        return self

    def goes_on(self, timeout=60):
        """Wait for one more token."""
        so_far = self.tokens
        wait_for(lambda: self.tokens > so_far or self.done, timeout, "the answer goes on")
        assert not self.done, f"the generation ended: {self.status} {self.error}"

    def close(self):
        # Who is not connected yet cannot leave: he would ask later, when nobody expects it.
        wait_for(lambda: self.done or self._connection.sock, 30, "a connection")
        with contextlib.suppress(OSError, AttributeError):  # it has just ended
            self._connection.sock.shutdown(socket.SHUT_RDWR)
        return self.wait(30)
