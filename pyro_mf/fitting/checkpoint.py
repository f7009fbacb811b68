"""Files of tensors, numbers and strings: written whole or not at all, read without running code."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_mf._errors import CheckpointError

FORMAT, VERSION = "pyro_mf fit", 1
_DOS_FOLDER = 0x10  # in a zip entry's attributes


def write_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping of tensors, numbers, strings, lists and mappings to one file.

    It goes to a temporary file beside the target, which then takes the target's name, so that a
    crash leaves the old file or the new one.

    Args:
        path: The file.
        content: What to write.

    Raises:
        TypeError: If there is anything else in it.
        IsADirectoryError: If the path is that of a folder.
        OSError: If its folder does not exist, or nothing can be written there.
    """
    plain = as_plain({"format": FORMAT, "version": VERSION, **content})
    _refuse_folder(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:  # names the temporary file, which nobody asked for
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(plain, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # a temporary file is its owner's alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_file(path: Path) -> dict[str, Any]:
    """Read what :func:`write_file` wrote; all tensors come back on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If the path is that of a folder.
        CheckpointError: If it is cut short, damaged, none of ours, holds anything but tensors,
            numbers and strings, or is of a newer version.
    """
    _refuse_folder(path)
    with path.open("rb") as file:
        magic = file.read(2)
    damaged = (
        f"'{path}' is cut short or damaged, or is no file that FitResult.save wrote. Save the fit "
        "again, or fit anew."
    )
    try:
        is_zip = zipfile.is_zipfile(path)
        is_whole = is_zip and _is_whole(path)
    except Exception as error:  # bytes that anybody may have changed raise anything
        raise CheckpointError(damaged) from error
    if not is_zip:
        cut = magic in (b"", b"PK")
        what = "is cut short or damaged" if cut else "is no file that FitResult.save wrote"
        raise CheckpointError(f"'{path}' {what}. Save the fit again, or fit anew.")
    if not is_whole:
        raise CheckpointError(damaged)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{path}' holds other things than tensors, numbers and strings, which could run code "
            "when they are read; nothing was run. Only files that FitResult.save wrote are read."
        ) from error
    except Exception as error:  # as above
        raise CheckpointError(damaged) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"'{path}' is no file that FitResult.save wrote.")
    version = content.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(
            f"'{path}' is damaged: its format should be a number from 1 to {VERSION}; got "
            f"{version!r}. Save the fit again, or fit anew."
        )
    if version > VERSION:
        raise CheckpointError(
            f"'{path}' was written by a newer version of pyro_mf (format {version}; "
            f"this one reads up to {VERSION}). Update pyro_mf."
        )
    return content


def as_plain(value: Any) -> Any:
    """The value with NumPy's numbers as Python's and tensors detached, on the CPU and contiguous.

    Raises:
        TypeError: If there is anything in it that ``torch.load(weights_only=True)`` refuses.

    Example:
        >>> as_plain({"a": np.float64(1.0), "b": (1, "x")})
        {'a': 1.0, 'b': [1, 'x']}
    """
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().clone()  # a view would save its whole base
    if isinstance(value, Mapping):
        return {as_plain(k): as_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(v) for v in value]
    raise TypeError(
        f"a saved fit holds tensors, numbers, strings, lists and mappings; got "
        f"{type(value).__name__}: {value!r}."
    )


def _is_whole(path: Path) -> bool:
    """Whether all checksums are right, which ``torch.load`` does not ask."""
    with zipfile.ZipFile(path) as archive:
        # What is marked as a folder torch reads as a tensor of no bytes, without an error.
        is_folder = any(entry.external_attr & _DOS_FOLDER for entry in archive.infolist())
        return not is_folder and archive.testzip() is None


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder. Give the path of a file.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
