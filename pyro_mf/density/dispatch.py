"""The base of this room's dispatch modes."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):
    """A dispatch mode that does not load torch's compiler at its first operation.

    torch wraps a mode's dispatch so that its compiler leaves it alone, for which it imports the
    compiler: two seconds, in a process that may never compile anything.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
