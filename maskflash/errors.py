"""The errors maskflash raises, and its warning: one base, so that `except MaskflashError` catches all errors.

Each is also the built-in exception a reader would expect (ValueError, TypeError, IndexError), so code that
knows nothing of maskflash handles them too.
"""


class MaskflashError(Exception):
    """Base of every error maskflash raises on purpose."""


class ArgumentError(MaskflashError, ValueError):
    """An argument has the wrong shape, range or combination; the text says operation, argument, got, expected, fix."""


class ArgumentTypeError(MaskflashError, TypeError):
    """An argument has the wrong type or dtype."""


class MaskTraceError(MaskflashError, TypeError):
    """A predicate does something that can't become an expression; the text says where, what and the fix."""


class MaskIndexError(MaskflashError, IndexError):
    """A mask reads a table out of range, or divides by zero, at a pair that no guard excludes."""


class UnsupportedMask(MaskflashError, ValueError):
    """A mask has no such form; the text says where it first departs from it."""


class BackendError(MaskflashError, RuntimeError):
    """The requested backend can't run here; nothing falls back silently."""


class DenseMaskWarning(UserWarning):
    """A mask was given as a tensor of all its pairs; the text says what to write instead."""
