"""The one warning class of the library, so that users can filter ours and nobody else's."""

__all__ = ["FloraWarning"]


class FloraWarning(UserWarning):
    """Something was done that the caller may want to know of."""
