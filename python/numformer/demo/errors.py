"""What goes wrong through no fault of the program."""

__all__ = ["DemoError"]


class DemoError(Exception):
    """A message of one line for the user.

    Parameters
    ----------
    message : str
    code : int
        Of the process: 2 for what was asked for, 1 for what happened on the way.
    """

    def __init__(self, message, code=2):
        super().__init__(" ".join(str(message).split()))
        self.code = code
