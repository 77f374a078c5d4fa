"""The exceptions a user is meant to read."""


class UserError(ValueError):
    """What is wrong, the value, and the cure, in one line; the command line prints it and exits with 2."""


class Stopped(Exception):
    """A signal asked the run to stop; it has finished its step and saved. The line says how to continue it."""
