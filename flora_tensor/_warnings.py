"""The one warning class of the library, so that users can filter ours and nobody else's, and where it points."""

import inspect
import warnings

__all__ = ["FloraWarning", "warn_user"]


class FloraWarning(UserWarning):
    """Something was done that the caller may want to know of."""


def warn_user(message: str) -> None:
    """Warn, at the line outside of the library that led here: that is the one its author can change."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals["__name__"].partition(".")[0] in ("flora_tensor", "flora_torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, FloraWarning, level)
