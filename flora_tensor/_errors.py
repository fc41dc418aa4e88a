"""The exceptions of the file floor: what a program that calls us can tell apart.

Arguments that cannot be honored are a plain ``ValueError`` or ``TypeError``; the operating system's refusals stay
``OSError``.
"""

__all__ = ["InputError", "ResourceError"]


class InputError(ValueError):
    """A file's content cannot be used: it is damaged, contradicts itself, or does not fit the other input.

    Examples
    --------
    >>> issubclass(InputError, ValueError)
    True
    """


class ResourceError(RuntimeError):
    """The work needs more memory than it may take; the message says for what and how much.

    Examples
    --------
    >>> issubclass(ResourceError, RuntimeError)
    True
    """
