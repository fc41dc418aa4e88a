"""Lists and dictionaries of parameters, whose entries are read with W + Σ s·ΔW."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from flora_torch.layers import FloraParameter

__all__ = ["FloraParameterCollection"]


class FloraParameterCollection(FloraParameter):
    """An nn.ParameterList or nn.ParameterDict with W + Σ s·ΔW in the place of some of its entries.

    Such a module is never called: the model reads its entries, by index, by key or one after the other, and gets the
    effective ones. It cannot be written to.

    Parameters
    ----------
    base_layer : nn.ParameterList or nn.ParameterDict
        The collection.
    parameter : str, optional
        The name of the first entry to adapt: its key, or its index as a string.
    ranks, adapter_name, **options
        As for `FloraParameter`.

    Raises
    ------
    ValueError
        As for `FloraParameter`.

    References
    ----------
    FLoRA, arXiv 2405.14739, equation 5.

    Examples
    --------
    >>> import torch
    >>> prompts = FloraParameterCollection(nn.ParameterList([torch.zeros(3, 4), torch.zeros(2)]), "0", ranks=1)
    >>> [tuple(entry.shape) for entry in prompts]
    [(3, 4), (2,)]
    """

    def __getitem__(self, key: Any) -> Any:
        """Return the effective entry of a key or index, or the entries of a slice."""
        if isinstance(self.base_layer, nn.ParameterList):
            if isinstance(key, slice):
                return [self[k] for k in range(*key.indices(len(self)))]
            if not -len(self) <= key < len(self):
                raise IndexError(f"FloraParameterCollection: index {key} for {len(self)} entries")
            key = str(key % len(self))
        return getattr(self, key)

    def __len__(self) -> int:
        """Return how many entries there are."""
        base: Any = self.base_layer
        return len(base)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the entries of a list, or the keys of a dictionary."""
        base: Any = self.base_layer
        return (self[k] for k in range(len(self))) if isinstance(base, nn.ParameterList) else iter(base)

    def __contains__(self, key: object) -> bool:
        """Tell whether a dictionary has a key."""
        base: Any = self.base_layer
        return key in base

    def keys(self) -> list[str]:
        """Return the keys of a dictionary."""
        base: Any = self.base_layer
        return list(base.keys())

    def values(self) -> list[Tensor]:
        """Return the effective entries of a dictionary, of the shapes that they have."""
        return [self[key] for key in self.keys()]

    def items(self) -> list[tuple[str, Tensor]]:
        """Return the keys of a dictionary with the effective entries, of the shapes that they have."""
        return [(key, self[key]) for key in self.keys()]
