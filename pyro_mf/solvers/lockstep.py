"""Several solvers on one density, their evaluations computed together.

Each solver runs in a thread of its own and waits until all have asked; then one call of the density
serves them all. A graph takes about as long for a hundred rows as for ten, so several starts cost
little more than one. Who asks what and when does not depend on the threads' timing, and neither do
the results.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_mf.density.blocks import Evaluate

T = TypeVar("T")

_POLL_SECONDS = 0.05  # how long Ctrl-C may have to wait


class Lockstep:
    """Gathers the calls of several threads into one.

    Args:
        function: Values ``(S,)`` and gradients ``(S, D)`` at the rows of ``(S, D)``.
        count: Number of members, each a thread.
    """

    def __init__(self, function: Evaluate, count: int) -> None:
        self._function = function
        self._count = count
        self._active = set(range(count))
        self._asked: dict[int, Tensor] = {}
        self._answers: dict[int, tuple[Tensor, Tensor] | BaseException] = {}
        self._to_interrupt: set[int] = set()
        self._changed = threading.Condition()

    def evaluate(self, member: int, z: Tensor) -> tuple[Tensor, Tensor]:
        """Ask for values and gradients; returns when all active members have asked.

        Args:
            member: Who asks.
            z: Rows; as long as all members ask for as many, the function sees one size.

        Raises:
            KeyboardInterrupt: Once, after :meth:`interrupt`.
        """
        with self._changed:
            self._asked[member] = z
            self._answer_if_complete()
            self._changed.wait_for(lambda: member in self._answers or member in self._to_interrupt)
            if member in self._to_interrupt:
                self._to_interrupt.remove(member)
                self._asked.pop(member, None)
                self._answers.pop(member, None)
                raise KeyboardInterrupt
            answer = self._answers.pop(member)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def leave(self, member: int) -> None:
        """Ask for nothing any more."""
        with self._changed:
            self._active.discard(member)
            self._answer_if_complete()

    def interrupt(self) -> None:
        """Raise ``KeyboardInterrupt`` in every member that asks, once."""
        with self._changed:
            self._to_interrupt = set(self._active)
            self._changed.notify_all()

    def _answer_if_complete(self) -> None:
        if not self._asked or set(self._asked) != self._active:
            return
        members = sorted(self._asked)
        rows = [self._asked.pop(member) for member in members]
        sizes = [len(z) for z in rows]
        rows += rows[-1:] * (self._count - len(rows))  # one size, one graph
        try:
            values, gradients = self._function(torch.cat(rows))
        except BaseException as error:
            self._answers |= dict.fromkeys(members, error)
        else:
            end = sum(sizes)
            parts = zip(values[:end].split(sizes), gradients[:end].split(sizes), strict=True)
            self._answers |= dict(zip(members, parts, strict=True))
        self._changed.notify_all()


def run_in_lockstep(
    function: Evaluate,
    jobs: Sequence[Callable[[Evaluate], T]],
) -> list[T | BaseException]:
    """Run jobs that each call one function, with their calls computed together.

    Args:
        function: As for :class:`Lockstep`.
        jobs: Each is called with its own way to the function, in a thread of its own. A job is to
            end on its own when the function raises ``KeyboardInterrupt``.

    Returns:
        What each job returned, or the exception that it ended with.
    """
    lockstep = Lockstep(function, len(jobs))
    results: list[Any] = [None] * len(jobs)

    def work(member: int) -> None:
        try:
            results[member] = jobs[member](lambda z: lockstep.evaluate(member, z))
        except BaseException as error:
            results[member] = error
        finally:
            lockstep.leave(member)

    threads = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(len(jobs))]
    waiting = list(threads)
    while waiting:
        try:
            for thread in threads:
                if thread.ident is None:
                    thread.start()
            waiting[0].join(_POLL_SECONDS)
            waiting = [thread for thread in waiting if thread.is_alive()]
        except KeyboardInterrupt:
            lockstep.interrupt()
    return results
