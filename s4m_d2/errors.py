"""One exception family for users' mistakes.

A message names the input, says what was expected and what to do about it. The command line prints
these without a traceback; everything else is a bug and keeps its traceback.
"""


class S4MError(Exception):
    """Base of every error that the user, not the program, can mend."""


class ConfigError(S4MError, ValueError):
    """A config key is unknown, of the wrong type, out of range or contradicts another."""


class DatasetError(S4MError, ValueError):
    """A data set, image, annotation or list of file names is missing or malformed."""


class WeightsError(S4MError, ValueError):
    """A checkpoint (model, backbone or SAM) is missing, damaged, unsafe or of another model."""


class DivergenceError(S4MError, FloatingPointError):
    """Training has stopped making progress: losses or gradients are no longer finite."""


class OutputError(S4MError, OSError):
    """A file cannot be written: the disk is full, read-only or not the user's."""


class WorkerError(S4MError, RuntimeError):
    """A process that shares the work has ended by itself: killed, or out of memory."""


class InputError(S4MError, ValueError):
    """An argument of a public function has the wrong shape, dtype or range."""
