"""The one exception of checkpoint readers."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A file that cannot be read as the checkpoint it claims to be, or holds something not
    supported.

    The message names the file, the thing inside it, what was expected, and what came.
    """
