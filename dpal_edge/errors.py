"""Every failure that a user can cause or meet; the command line prints each as one line.

A message says what came, what was expected and how to fix it. Caller bugs stay ``TypeError`` and ``ValueError``.
"""


class DpalEdgeError(Exception):
    """Base class; ``exit_code`` is what the command line returns."""

    exit_code = 1


class ConfigError(DpalEdgeError):
    """An option or a configuration value is out of range, unknown or in conflict with another."""


class DataError(DpalEdgeError):
    """A folder, image, video or camera cannot be used."""


class ModelFileError(DpalEdgeError):
    """A checkpoint, bundle or model file is missing, damaged or of the wrong kind."""


class BackendUnavailable(DpalEdgeError):
    """Nothing installed here can do this; the message names what to install."""


class ParityError(DpalEdgeError):
    """An exported model differs from its source by more than the tolerance: nothing is shipped."""

    exit_code = 2
