"""Pages that this machine serves to its user: who may ask, and the server, of the standard library alone.

`app` and `static/` are what the pages of `label` and `chat` have in common. `app` needs bottle, so
it is not loaded here.
"""

from rlhf_jax.commands.web.server import HEADERS, LOOPBACK, guard, listening, make_server, serve
