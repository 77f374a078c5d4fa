"""What the pages have in common: their files, and that whatever goes wrong is a line of JSON."""

from __future__ import annotations

import json
from pathlib import Path

import bottle

from rlhf_jax.errors import reason, tell
from rlhf_jax.hosts.json_text import JsonObject

SHARED = Path(__file__).parent / "static"


def make_app(static: Path, what: str) -> bottle.Bottle:
    """An app with page.html of a folder at /, and the files there and of those that all pages share.

    Errors are {"error": line}; of one that nobody foresaw a line goes to standard error, after `what`.
    """
    app = bottle.Bottle()

    @app.get("/")
    def index() -> bottle.HTTPResponse:
        return bottle.static_file("page.html", root=static)

    @app.get("/<name:re:[a-z.-]+\\.(css|js|svg)>")
    def file(name: str) -> bottle.HTTPResponse:
        return bottle.static_file(name, root=static if (static / name).exists() else SHARED)

    @app.error(400)
    @app.error(404)
    @app.error(405)
    @app.error(413)
    @app.error(500)
    @app.error(507)
    def failed(error: bottle.HTTPError) -> str:
        if error.exception is not None:
            tell(f"{what}: {type(error.exception).__name__}: {reason(error.exception)}", error=True)
        bottle.response.content_type = "application/json"
        return json.dumps({"error": str(error.body)})

    return app


def posted() -> JsonObject:
    """The JSON object that was posted; a 400 if it is none."""
    try:
        said = bottle.request.json
    except RecursionError:
        said = None
    if not isinstance(said, dict):
        raise bottle.HTTPError(400, "What is posted is a JSON object.")
    return said
