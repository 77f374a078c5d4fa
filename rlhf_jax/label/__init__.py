"""`rlhf-jax label`: a local web page on which people rank responses, and the file of their answers. Floor 4.

`items` makes of rows what a rater sees, `votes` keeps the answers, `server` serves the page in `static/`.
"""

from rlhf_jax.label.server import run

__all__ = ["run"]
