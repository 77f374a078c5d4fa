"""A Hugging Face Hub on the loopback address: files of repositories, creating one, a commit; a token is asked for."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading

TOKEN = "hf_secretOfTheTests"
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`files` are bytes by (kind, repository, name), kind datasets or models; `large` are uploads by their SHA-256."""

    def __init__(self):
        self.files, self.made, self.asked, self.large = {}, {}, [], {}

    def answer(self, method, path, headers, body, address):
        """(status, headers, body) of a request."""
        if path.startswith("/large/"):
            self.large[path.removeprefix("/large/")] = body
            return 200, {}, b""
        match = re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match:
            data = self.files.get((match[1] or "models", match[2], match[4]))
            if data is None or match[3] not in ("main", "v1", SHA):
                code = "EntryNotFound" if match[3] in ("main", "v1", SHA) else "RevisionNotFound"
                return 404, {"x-error-code": code}, b""
            tag = hashlib.sha1(data).hexdigest()
            return 200, {"etag": f'"{tag}"', "x-repo-commit": SHA}, data
        if headers.get("authorization") != f"Bearer {TOKEN}" and not path.startswith("/api/datasets/"):
            return 401, {}, json.dumps({"error": "Invalid username or password."}).encode()
        said = self.api(method, path, body, address)
        return (
            (200, {}, json.dumps(said).encode()) if said is not None else (404, {"x-error-code": "RepoNotFound"}, b"")
        )

    def api(self, method, path, body, address):
        """What the API says as JSON; None where there is no such thing."""
        if path == "/api/whoami-v2":
            return {"name": "owner", "type": "user"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.made[f"{asked.get('organization', 'owner')}/{asked['name']}"] = asked
            return {"url": f"{address}/owner/{asked['name']}"}
        if not (match := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(.*)", path)):
            return None
        kind, name, rest = match.groups()
        held = {file: data for (k, n, file), data in self.files.items() if (k, n) == (kind, name)}
        if not held and name not in self.made:
            return None
        if rest.startswith("/tree/"):
            return [{"type": "file", "path": f, "size": len(d), "oid": "0" * 40} for f, d in held.items()]
        if rest.startswith("/preupload/"):
            files = json.loads(body)["files"]
            large = lambda file: "lfs" if file["path"].endswith(".safetensors") else "regular"  # noqa: E731
            return {"files": [{"path": f["path"], "uploadMode": large(f), "shouldIgnore": False} for f in files]}
        if rest.startswith("/commit/"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[kind, name, value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[kind, name, value["path"]] = self.large[value["oid"]]
                elif line["key"] == "deletedFile":
                    del self.files[kind, name, value["path"]]
            return {"commitUrl": f"{address}/{name}/commit/{SHA}", "commitOid": SHA, "success": True}
        return {"id": name, "sha": SHA, "siblings": [{"rfilename": file} for file in held]}


@contextlib.contextmanager
def served(hub):
    """The Hub behind an address, which is given."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version, wbufsize = "HTTP/1.1", 1 << 16

        def do(self):
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            path = self.path.partition("?")[0]
            hub.asked.append((self.command, path))
            if path.endswith("/info/lfs/objects/batch"):
                objects = json.loads(body)["objects"]
                up = lambda one: {"upload": {"href": f"{address}/large/{one['oid']}"}}  # noqa: E731
                said = {"transfer": "basic", "objects": [{**one, "actions": up(one)} for one in objects]}
                status, headers, data = 200, {}, json.dumps(said).encode()
            else:
                status, headers, data = hub.answer(self.command, path, self.headers, body, address)
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else data)

        do_GET = do_POST = do_HEAD = do_PUT = do

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
