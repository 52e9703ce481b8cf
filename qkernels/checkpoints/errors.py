"""The one exception of checkpoint readers."""

from __future__ import annotations

MESSAGE_LIMIT = 3000


class CheckpointError(ValueError):
    """A file that cannot be read as the checkpoint it claims to be, or holds something not
    supported.

    The message names the file, the thing inside it, what was expected, and what came. It has a
    bounded length, whatever names a damaged file holds.
    """

    def __init__(self, message: str = "") -> None:
        if len(message) > MESSAGE_LIMIT:
            message = f"{message[:MESSAGE_LIMIT]}... ({len(message)} characters)"
        super().__init__(message)
