"""A real OTLP/HTTP endpoint on loopback that keeps the spans it is sent, for the tests of tracing. It can be told to hang or to refuse."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Sink:
    """`spans` are those received so far, `services` the names of who sent them; `hold` makes requests wait, `status` is the reply."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.raw: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.open = threading.Event()
        self.open.set()
        self.status = 200
        self.url = ""

    def take(self, body: bytes) -> None:
        received = ExportTraceServiceRequest.FromString(body)
        for resource in received.resource_spans:
            self.services |= {each.value.string_value for each in resource.resource.attributes if each.key == "service.name"}
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)


@contextmanager
def sink() -> Iterator[Sink]:
    """The endpoint, for the time of a `with`; its `url` ends in /v1/traces."""
    kept = Sink()

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kept.open.wait(30)
            kept.raw.append(body)
            kept.headers.append({name.lower(): value for name, value in self.headers.items()})
            if kept.status == 200:
                kept.take(body)
            self.send_response(kept.status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    kept.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
    try:
        yield kept
    finally:
        kept.open.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
