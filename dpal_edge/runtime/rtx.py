"""The bindings of TensorRT for RTX over the libraries that come in another package."""

from typing import Any


def load_bindings() -> Any:
    """Import ``tensorrt_rtx_bindings``; they ask for plain sonames, which libraries satisfy that are loaded already.

    The function imports all it needs itself, because the doctor runs its source in a process of its own.

    Raises:
        ImportError: one of the two packages is not installed.
        OSError: a library cannot be loaded.
    """
    import ctypes
    import importlib
    from importlib.util import find_spec
    from pathlib import Path

    bundled = find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    for folder in (bundled.submodule_search_locations or ()) if bundled else ():
        for name in ("libcudart.so", "libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so"):  # each needs those before
            for file in Path(folder).glob(f"{name}.*"):
                ctypes.CDLL(str(file), ctypes.RTLD_GLOBAL)
    return importlib.import_module("tensorrt_rtx_bindings")
