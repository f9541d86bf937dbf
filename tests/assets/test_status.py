"""What is said of the release after it moved."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from rag_assets.status import describe, follow
from rag_serving.settings import Places, Settings


def test_another_program_at_the_servers_port_is_no_server(tmp_path):
    """Whatever JSON answers there, a change of the release is told as done, without a server that followed."""

    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    settings = Settings(root=tmp_path, places=Places(serving_port=server.server_address[1]))
    seconds, word = follow(settings, 1)
    thread.join()
    server.server_close()
    assert (seconds, word.startswith("No server answers here")) == (None, True)


def test_a_damaged_snapshot_does_not_hide_the_others(line):
    """A manifest that was edited is told as damaged, by its snapshot's id; the other snapshots and the release are told as ever."""
    store, manifests = line
    broken = manifests[0].snapshot_id
    (store.root / "snapshots" / broken / "MANIFEST.json").write_text("{")
    facts = describe(Settings(root=store.root, places=Places(store=store.root)))
    told = {each["snapshot_id"]: "damaged" in each for each in facts["snapshots"]}
    assert told == {manifest.snapshot_id: manifest.snapshot_id == broken for manifest in manifests}
