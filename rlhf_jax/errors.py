"""The one exception a user is meant to read."""


class UserError(ValueError):
    """What is wrong, the value, and the cure, in one line; the command line prints it and exits with 2."""
