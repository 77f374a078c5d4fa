"""A bucket service on the loopback address, as far as tensorstore speaks to one: ranges, generations, faults."""

import contextlib
import http.server
import json
import re
import threading
import urllib.parse

WHEN = "2020-01-01T00:00:00Z"


def refused(status, why):
    """An answer as the service words it."""
    return status, {}, json.dumps({"error": {"code": status, "message": why}}).encode()


class Bucket:
    """Objects by name, each (bytes, generation); `asked` counts requests, `faults` are taken one at a time.

    A fault is a function (method, name) -> None, an HTTP status to answer in its place, or "lost": it is done, and
    answered by 503 all the same.
    """

    def __init__(self, name="bucket"):
        self.name, self.objects, self.generation = name, {}, 0
        self.asked, self.sent, self.faults, self.lock = [], 0, [], threading.Lock()

    def put(self, name, data):
        with self.lock:
            self.generation += 1
            self.objects[name] = (bytes(data), self.generation)

    def put_tree(self, folder, below):
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{below}/{path.relative_to(folder)}", path.read_bytes())

    def answer(self, method, path, query, headers, body):
        """(status, headers, body) of a request."""
        upload, name = path.startswith("/upload"), None
        match = re.fullmatch(r"(?:/upload)?/storage/v1/b/([^/]+)/o(?:/(.+))?", path)
        if match is None or match[1] != self.name:
            return refused(404, "The specified bucket does not exist.")
        name = query.get("name") if upload else match[2] and urllib.parse.unquote(match[2])
        fault = next((said for fault in self.faults if (said := fault(method, name))), None)
        if fault and fault != "lost":
            return refused(fault, "a fault of the test")
        reply = self._do(method, name, query, headers, body)
        return refused(503, "the reply is lost") if fault else reply

    def _do(self, method, name, query, headers, body):
        if name is None:
            first, last = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
            items = [{"name": n, "size": str(len(d)), "generation": str(g)} for n, (d, g) in self.objects.items()]
            items = sorted((i for i in items if first <= i["name"] < last), key=lambda i: i["name"])
            page, at = 3, int(query.get("pageToken", 0))
            more = {"nextPageToken": str(at + page)} if len(items) > at + page else {}
            return 200, {}, json.dumps({"items": items[at : at + page], **more}).encode()
        with self.lock:
            data, there = self.objects.get(name, (b"", 0))
            if int(query.get("ifGenerationMatch", there)) != there:
                return 412, {}, b""
            if method == "GET" and int(query.get("ifGenerationNotMatch", -1)) == there:
                return 304, {}, b""
            if method == "POST":
                self.generation += 1
                self.objects[name] = (body, self.generation)
                return 200, {}, json.dumps({"name": name, "generation": str(self.generation)}).encode()
            if not there:
                return 404, {}, b""
            if method == "DELETE":
                del self.objects[name]
                return 204, {}, b""
        if query.get("alt") == "json":
            about = {"name": name, "size": str(len(data)), "generation": str(there)}
            return 200, {}, json.dumps({**about, "timeCreated": WHEN, "updated": WHEN}).encode()
        stamp = {"x-goog-generation": str(there)}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", "")):
            first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
            if first >= len(data):
                return 416, stamp, b""
            return 206, {**stamp, "content-range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]
        return 200, stamp, data


@contextlib.contextmanager
def served(bucket, monkeypatch):
    """The bucket behind an address that this process and those it starts take for the service's."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version, wbufsize = "HTTP/1.1", 1 << 16  # head and body in one packet: else each waits for the other

        def do(self):
            path, _, query = self.path.partition("?")
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            asked = dict(urllib.parse.parse_qsl(query))
            status, headers, data = bucket.answer(self.command, path, asked, self.headers, body)
            bucket.asked.append((self.command, urllib.parse.unquote(self.path), status))
            bucket.sent += len(data)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status not in (204, 304):
                self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = do

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "x")
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
