"""A server and its callers in processes of their own, for what the kernel tells of connections."""

import contextlib
import subprocess
import sys

CALLER = """
import socket, sys
caller = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
first, *others = sys.argv[2:]
caller.sendall(first.encode())
for text in others:
    caller.recv(4096)
    caller.sendall(text.encode())
print(flush=True)
sys.stdin.read()
"""

# It reads as Ollama does: each request, and a file once it knows what is asked for. A request
# may come in several pieces, and in two where its head says so.
SERVER = """
import os, socket, sys, threading
def serve(connection):
    while request := os.read(connection.fileno(), 1 << 16):
        if request.endswith(b"100-continue"):
            os.write(connection.fileno(), b"HTTP/1.1 100 Continue\\r\\n\\r\\n")
        if request.endswith(b"}"):
            with open(sys.argv[1], "rb") as file:
                file.read()
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
while True:
    threading.Thread(target=serve, args=[server.accept()[0]], daemon=True).start()
"""


@contextlib.contextmanager
def program(text, *arguments):
    """Run a program; give it and the first line that it says."""
    command = [sys.executable, "-IS", "-c", text, *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()


@contextlib.contextmanager
def caller(port, *texts):
    """A process that has connected, and has sent a text, and each other once it got an answer."""
    with program(CALLER, port, *(texts or [""])):
        yield


@contextlib.contextmanager
def server(file):
    """A server that reads the file for each request that ends with "}": its process and port."""
    with program(SERVER, file) as (process, said):
        yield process, int(said)
