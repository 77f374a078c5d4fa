"""Who judges and how: judges, sources of responses, and what is reported of them."""
