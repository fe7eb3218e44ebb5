"""The methods of distillation: each file here is one, named as ``--method`` names it."""

import pkgutil
from importlib import import_module

from dpal_edge.errors import ConfigError
from dpal_edge.train.method import Method

METHODS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def find_method(name: str) -> type[Method]:
    """Return the class ``METHOD`` of the file ``name``.

    Raises:
        ConfigError: there is no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"method is {name!r}, expected one of {', '.join(METHODS)}")
    method: type[Method] = import_module(f"{__name__}.{name}").METHOD
    return method
