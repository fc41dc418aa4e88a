"""Which parameters a model had trained before adapters froze it: noted, and given back."""

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from flora_torch.update import TuckerUpdate

__all__ = ["all_or_nothing", "freeze", "thaw"]

# Under this name a module notes which of its own parameters were frozen.
_FROZEN = "_flora_frozen"


def freeze(module: nn.Module) -> None:
    """Stop the gradients of every parameter of a module that is not part of an update, and note which ones had them.

    The note lives on the module that owns the parameter, so that it survives copying, pickling and moving.

    Examples
    --------
    >>> linear = nn.Linear(2, 2)
    >>> freeze(linear)
    >>> linear.weight.requires_grad
    False
    """
    for owner in _outside_updates(module):
        live = [name for name, p in owner.named_parameters(recurse=False) if p.requires_grad]
        if live:
            owner.__dict__[_FROZEN] = (*owner.__dict__.get(_FROZEN, ()), *live)
            for name in live:
                owner.get_parameter(name).requires_grad = False


def thaw(module: nn.Module) -> None:
    """Undo `freeze`.

    Examples
    --------
    >>> linear = nn.Linear(2, 2)
    >>> freeze(linear)
    >>> thaw(linear)
    >>> linear.weight.requires_grad
    True
    """
    for owner in _outside_updates(module):
        own = dict(owner.named_parameters(recurse=False))
        for name in owner.__dict__.pop(_FROZEN, ()):
            if name in own:
                own[name].requires_grad = True


@contextmanager
def all_or_nothing(model: nn.Module) -> Generator[None, None, None]:
    """Put gradients' flags back as they were if the body fails: wrapping freezes bases before everything is checked."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    notes = [(m, m.__dict__.get(_FROZEN)) for m in model.modules()]
    try:
        yield
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad = flag
        for module, note in notes:
            module.__dict__.pop(_FROZEN, None)
            if note is not None:
                module.__dict__[_FROZEN] = note
        raise


def _outside_updates(module: nn.Module) -> list[nn.Module]:
    """List a module and all below it, without those of trainable updates."""
    found: dict[int, nn.Module] = {}
    waiting = [module]
    while waiting:
        owner = waiting.pop()
        if id(owner) not in found and not isinstance(owner, TuckerUpdate):
            found[id(owner)] = owner
            waiting.extend(owner.children())
    return list(found.values())
