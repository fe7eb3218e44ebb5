"""Reading MATLAB's files of annotations."""

import zlib
from pathlib import Path
from typing import Any

from dpal_edge.errors import BackendUnavailable, DataError
from dpal_edge.tasks.sample import require

# What SciPy raises on files that are cut short, damaged, or of version 7.3 (which is HDF5).
_DAMAGE = (
    OSError, ValueError, TypeError, LookupError, ArithmeticError, NameError, MemoryError, NotImplementedError,
    zlib.error,
)  # fmt: skip


def read_mat(path: Path, expected: str) -> dict[str, Any]:
    """Return the variables of a .mat file up to version 7.2, their axes of length 1 squeezed.

    Structs become dicts, cells lists where structs are in them and arrays elsewhere.

    Raises:
        DataError: missing, damaged, or of version 7.3; ``expected`` says what should be there.
        BackendUnavailable: SciPy is not installed.
    """
    require(path, expected)
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"{path}: .mat files need SciPy: pip install 'dpal-edge[evaluate]'") from error
    try:
        variables: dict[str, Any] = loadmat(path, simplify_cells=True)
    except (MatReadError, *_DAMAGE) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{path}: cannot be read as a .mat file ({reason}); expected {expected}") from error
    return variables
