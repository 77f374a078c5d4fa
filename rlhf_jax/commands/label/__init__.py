"""`rlhf-jax label`: a local web page on which people rank responses, and the file of their answers.

`items` makes of rows what a rater sees, `votes` keeps the answers, `server` serves the page in `static/`.
"""

from rlhf_jax.commands.label.server import run
