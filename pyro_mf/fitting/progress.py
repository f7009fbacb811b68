"""The progress bar of a fit: what is happening, the ELBO with its error, and the work done."""

from __future__ import annotations

import math
import sys
import warnings
from types import TracebackType
from typing import Any

from pyro_mf.solvers.outcome import Progress, Report


class ProgressBar:
    """A bar on standard error, or in a notebook a widget; a context manager that solvers call.

    Args:
        shown: Whether to show it; ``None`` shows it in a terminal and in a notebook.

    Example:
        >>> with ProgressBar(shown=False) as bar:
        ...     bar(Progress("32 draws", 12, -34.5, 0.02))
    """

    def __init__(self, *, shown: bool | None = None) -> None:
        self._label = "fit"
        self._shown = (sys.stderr.isatty() or _in_notebook()) if shown is None else shown
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        if self._shown:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of notebooks without ipywidgets: text serves
                from tqdm.auto import tqdm

            self._bar = tqdm(bar_format="{desc} [{elapsed}]", leave=False, miniters=1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def labelled(self, label: str) -> Report:
        """A report to this bar with this in front, such as ``"start 2 of 4"``."""

        def show(progress: Progress) -> None:
            self._label = label
            self(progress)

        return show

    def __call__(self, progress: Progress) -> None:
        """Show the latest; a solver may call this as often as it likes."""
        if self._bar is not None:
            self._bar.set_description_str(f"{self._label}: {describe(progress)}", refresh=False)
            if self._bar.n == 0:
                self._bar.refresh()
            self._bar.update()  # draws at most every tenth of a second


def describe(progress: Progress) -> str:
    """One line of text.

    Example:
        >>> describe(Progress("32 draws", 12, -34.512, 0.02))
        '32 draws | ELBO -34.512 ± 0.020 | 12 gradients'
    """
    parts = [progress.phase]
    if math.isfinite(progress.elbo):
        parts.append(f"ELBO {with_error(progress.elbo, progress.elbo_se)}")
    if progress.gradients:
        parts.append(f"{progress.gradients} gradients")
    return " | ".join(parts)


def with_error(value: float, error: float) -> str:
    """A number and its error, both to two significant digits of the error.

    Example:
        >>> with_error(-34.5123, 0.0234), with_error(-1234.5, 12.3), with_error(2.0, float("nan"))
        ('-34.512 ± 0.023', '-1234 ± 12', '2.00')
    """
    if not math.isfinite(error):
        return f"{value:.2f}"
    digits = min(4, max(0, 1 - math.floor(math.log10(error)))) if error > 0 else 2
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel")
