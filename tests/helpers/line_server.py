"""An upstream that sends lines one by one, as a test wants, and notices who has left."""

import http.server
import queue
import threading


class LineServer:
    """Answers every GET: .port .send(line) .end() .left (an Event)

    /lines is a stream of what is sent, each line in a chunk of its own; all else is an empty page.
    """

    def __init__(self):
        self.left = threading.Event()
        self._lines = queue.Queue()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.handle_error = lambda *_: None  # a proxy ends its connections as it likes
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def send(self, line):
        self._lines.put(line)

    def end(self):
        self._lines.put(b"")

    def close(self):
        self.end()
        self._server.shutdown()
        self._server.server_close()

    def stream(self, file):
        """Write what is sent, until the end or until nobody reads it."""
        try:
            while line := self._lines.get():
                file.write(b"%x\r\n%s\r\n" % (len(line), line))
            file.write(b"0\r\n\r\n")
        except OSError:
            self.left.set()

    def _handler(self):
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                is_stream = self.path == "/lines"
                fields = {"Content-Type": "text/html", "Content-Length": "0"}
                if is_stream:
                    fields = {"Content-Type": "text/plain", "Transfer-Encoding": "chunked"}
                self.send_response(200)
                for field in fields.items():
                    self.send_header(*field)
                self.end_headers()
                if is_stream:
                    server.stream(self.wfile)

            def log_message(self, *_):
                """Stay quiet."""

        return Handler
