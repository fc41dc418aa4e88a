"""A frozen module and its named adapters: which there are, which of them take part, and what is merged in place.

Nothing here computes with a weight; `flora_torch.flora_layer` does.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flora_torch.base_weight import adaptable, check_adaptable
from flora_torch.freezing import freeze
from flora_torch.rows import RowPlan
from flora_torch.update import TuckerUpdate

__all__ = ["TAKEN_NAMES", "AdaptedModule", "check_adapter_name"]


# What a ModuleDict calls something else already, and refuses as a key.
TAKEN_NAMES = frozenset(dir(nn.ModuleDict()))


class AdaptedModule(nn.Module):
    """A frozen ``base_layer`` and the named updates of its parameters: what `FloraLayer` is before any arithmetic.

    Its parameters and attributes are those that `FloraLayer` describes.
    """

    base_layer: nn.Module
    tucker_update: nn.ModuleDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if isinstance(base_layer, AdaptedModule):
            raise TypeError(
                f"{type(self).__name__}: the base is a {type(base_layer).__name__} already; use its add_adapter"
            )
        self.base_layer = base_layer
        self.tucker_update = nn.ModuleDict()
        self._active_adapters: list[str] = []
        self._enabled = True
        self.merged_adapters: tuple[str, ...] = ()
        # What merged weights were before, by the parameter's name.
        self.originals: dict[str, Tensor] = {}
        self.row_plan: RowPlan | None = None
        # A model in evaluation stays in evaluation: a new module would be in training, and would drop its input.
        self.training = base_layer.training
        freeze(base_layer)

    @property
    def _base(self) -> Any:
        # Asked several times at every call, and nn.Module's own search takes longer than a small product.
        return self.__dict__["_modules"]["base_layer"]

    def __getattr__(self, name: str) -> Any:
        # While unpickling there are no modules yet.
        modules = self.__dict__.get("_modules")
        if modules is not None and name in modules:
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A property that failed must not look like the base's attribute. Nor are special methods for the base alone
            # to answer: a parametrized one has a `__deepcopy__`.
            if modules is None or name == "base_layer" or name.startswith("__") or hasattr(type(self), name):
                raise
            return getattr(self.base_layer, name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse a parameter, as assigning one does: those of a layer are its base's, which would not be changed.

        Parameters
        ----------
        name : str
            The name.
        param : nn.Parameter, of any shape, or None
            The parameter.

        Raises
        ------
        ValueError
            Always.
        """
        del param
        raise ValueError(
            f"{type(self).__name__}: {name!r} cannot be set on a layer with an adapter, whose parameters are those of "
            f"its base_layer, a {type(self.base_layer).__name__}; set it there, or tie, resize and replace weights "
            "before the adapter is attached or after it is merged or detached"
        )

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        # Asked by transformers, which writes no file with a tensor in two places unless both say that it may leave one
        # out: tied weights have one update, and stay tied in the model that the file is loaded into.
        return {name: name for name, _ in self.named_parameters()}

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that take part, in the order in which they are added up."""
        return self._active_adapters

    @active_adapters.setter
    def active_adapters(self, names: Iterable[str]) -> None:
        names = list(names)
        self.check_active(names)
        self._active_adapters = names

    def check_active(self, names: list[str]) -> None:
        """Refuse a choice of adapters that what is merged in place does not allow.

        Parameters
        ----------
        names : list of str
            The adapters that would be active.

        Raises
        ------
        ValueError
            If one that is merged is not among them, or one that is not merged has a magnitude.
        """
        for merged in self.merged_adapters:
            if merged not in names:
                raise ValueError(
                    f"{type(self).__name__}: adapter {merged!r} is merged into the weight; call unmerge_ first"
                )
        added = [name for name in names if self.merged_adapters and name not in self.merged_adapters]
        if any(update.magnitude is not None for name in added for update in self.updates(name).values()):
            raise ValueError(
                f"{type(self).__name__}: a magnitude rescales the layer's own weight, and adapter "
                f"{self.merged_adapters[0]!r} is merged into it; call unmerge_ first"
            )

    @property
    def enabled(self) -> bool:
        """Whether the adapters take part at all."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if self.merged_adapters and not value:
            raise ValueError(
                f"{type(self).__name__}: adapter {self.merged_adapters[0]!r} is merged into the weight and cannot be "
                "switched off; call unmerge_ first"
            )
        self._enabled = value

    def updates(self, adapter_name: str) -> dict[str, TuckerUpdate]:
        """Return an adapter's updates by the name of the parameter they change; empty where it has none.

        Parameters
        ----------
        adapter_name : str
            The adapter.

        Returns
        -------
        dict of str to TuckerUpdate
            One entry for each parameter.

        Raises
        ------
        NotImplementedError
            If called on `FloraLayer` itself.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> list(FloraLinear(nn.Linear(4, 3), ranks=2).updates("default"))
        ['weight']
        """
        raise NotImplementedError

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The parameters of the base layer that have updates."""
        names = (name for adapter in self.tucker_update for name in self.updates(adapter))
        return tuple(dict.fromkeys(names))

    def check_update(self, adapter_name: str, update: TuckerUpdate, *, parameter: str = "weight") -> None:
        """Refuse an update that this layer cannot have, before anything is changed.

        Parameters
        ----------
        adapter_name : str
            The name that it would get.
        update : TuckerUpdate
            The update.
        parameter : str
            The parameter that it would change.

        Raises
        ------
        ValueError
            If the adapter's name is taken or impossible, the parameter cannot be adapted, or shapes differ.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> layer = FloraLinear(nn.Linear(4, 3))
        >>> layer.check_update("default", FloraLinear(nn.Linear(4, 3), ranks=1).tucker_update["default"])
        """
        where, weight = type(self).__name__, check_adaptable(type(self).__name__, self.base_layer, parameter)
        check_adapter_name(where, adapter_name)
        if parameter in self.updates(adapter_name):
            raise ValueError(
                f"{where}: there is an adapter {adapter_name!r} for {parameter!r} already; "
                "choose another adapter_name, or remove that one first"
            )
        if update.shape != tuple(weight.shape):
            raise ValueError(
                f"{where}: an update of shape {update.shape} for {parameter!r} of shape {tuple(weight.shape)}; "
                "pass one of the same shape"
            )
        if self.merged_adapters and (update.magnitude is not None or adapter_name in self.merged_adapters):
            raise ValueError(
                f"{where}: adapter {self.merged_adapters[0]!r} is merged into the weight that the update belongs to; "
                "call unmerge_ first"
            )

    def install(self, adapter_name: str, update: TuckerUpdate, *, parameter: str = "weight") -> None:
        """Put an update on the layer and activate it; it may be shared with another layer whose weight is tied.

        Parameters
        ----------
        adapter_name : str
            A name that this layer does not have yet.
        update : TuckerUpdate
            An update of the parameter's shape.
        parameter : str
            The parameter of the base layer.

        Raises
        ------
        ValueError
            As for `check_update`.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> layer, other = FloraLinear(nn.Linear(4, 3)), FloraLinear(nn.Linear(4, 3), ranks=1)
        >>> layer.install("shared", other.tucker_update["default"])
        """
        self.check_update(adapter_name, update, parameter=parameter)
        self._put(adapter_name, update, parameter)
        if adapter_name not in self.active_adapters:
            self.active_adapters.append(adapter_name)

    def remove_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; without one left, the layer is its base.

        Parameters
        ----------
        adapter_name : str
            The adapter.

        Raises
        ------
        ValueError
            If there is none of this name.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> layer = FloraLinear(nn.Linear(4, 3), ranks=2)
        >>> layer.remove_adapter("default")
        >>> len(layer.tucker_update)
        0
        """
        self._check_has(adapter_name)
        # The setter refuses where it is merged.
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]
        del self.tucker_update[adapter_name]

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name; its place in the order, its parameters and its switches stay.

        Parameters
        ----------
        old, new : str
            The names.

        Raises
        ------
        ValueError
            If there is no adapter of the old name, or the new one is taken or impossible.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> layer = FloraLinear(nn.Linear(4, 3), ranks=2)
        >>> layer.rename_adapter("default", "style")
        >>> list(layer.tucker_update), layer.active_adapters
        (['style'], ['style'])
        """
        where = type(self).__name__
        self._check_has(old)
        if new != old:
            check_adapter_name(where, new)
            if new in self.tucker_update:
                raise ValueError(
                    f"{where}: there is an adapter {new!r} already; remove it first, or choose another name"
                )
        modules = [(new if name == old else name, module) for name, module in self.tucker_update.items()]
        # Kept as one object: an optimizer, a compiled graph or a hook may hold it.
        self.tucker_update.clear()
        for name, module in modules:
            self.tucker_update[name] = module
        self._active_adapters = [new if name == old else name for name in self._active_adapters]
        self.merged_adapters = tuple(new if name == old else name for name in self.merged_adapters)

    def _check_has(self, adapter_name: str) -> None:
        if adapter_name not in self.tucker_update:
            known = ", ".join(self.tucker_update) or "none"
            raise ValueError(f"{type(self).__name__}: there is no adapter {adapter_name!r}; it has {known}")

    def _update(self, adapter_name: str, parameter: str) -> TuckerUpdate | None:
        """Return an adapter's update of a parameter; ``None`` where it has none."""
        return self.updates(adapter_name).get(parameter)

    def running(self, parameter: str = "weight") -> list[TuckerUpdate]:
        """Return the updates of a parameter that take part in the output now.

        Parameters
        ----------
        parameter : str
            The parameter.

        Returns
        -------
        list of TuckerUpdate
            In the order in which they are added.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> layer = FloraLinear(nn.Linear(4, 3), ranks=2)
        >>> layer.enabled = False
        >>> layer.running()
        []
        """
        if not self._enabled:
            return []
        active, merged = self._active_adapters, self.merged_adapters
        if merged:
            self._check_not_training()
            active = [adapter for adapter in active if adapter not in merged]
        found = [self._update(adapter, parameter) for adapter in active]
        running = [update for update in found if update is not None]
        for update in running:
            self._check_present(update)
        return running

    def _check_present(self, update: TuckerUpdate) -> None:
        """Refuse to compute with an update that accelerate keeps elsewhere: what is read is not brought in.

        PyTorch computes with numbers of nowhere, without an error, where it adds a product to a tensor that is there.
        """
        if "_hf_hook" in update.__dict__ and update.core.is_meta:
            name = type(self).__name__
            raise RuntimeError(
                f"{name}: the update's values are offloaded, and only a call of the layer can bring them along; pass "
                f"preload_module_classes=[{name!r}, …] with every kind of adapted layer to what offloads the model"
            )

    def _check_not_training(self) -> None:
        """Refuse a step of training that would pass a merged adapter by."""
        if not (self.training and torch.is_grad_enabled()):
            return
        for adapter in self.merged_adapters:
            if any(p.requires_grad for update in self.updates(adapter).values() for p in update.parameters()):
                raise RuntimeError(
                    f"{type(self).__name__}: adapter {adapter!r} is merged into the weight and would not be trained; "
                    "call unmerge_ first, or put the model in evaluation"
                )

    def original(self, parameter: str) -> Tensor:
        """Return a parameter of the base as it is with nothing merged, without its gradient.

        Parameters
        ----------
        parameter : str
            The parameter.

        Returns
        -------
        Tensor, of the parameter's shape
            W.

        Raises
        ------
        ValueError
            If its values are packed in a way that nothing is known of.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> FloraLinear(nn.Linear(4, 3)).original("weight").shape
        torch.Size([3, 4])
        """
        weight = adaptable("merge", self.base_layer, parameter).detach()
        return self.originals[parameter].to(weight.device) if parameter in self.originals else weight

    def _put(self, adapter_name: str, update: TuckerUpdate, parameter: str) -> None:
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # What a merged weight was before moves and changes its type together with the weight.
        super()._apply(fn, recurse)
        self.originals = {name: fn(value) for name, value in self.originals.items()}
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state with nothing merged, whatever is: the adapters would count twice where it is loaded.

        Parameters
        ----------
        *args, **kwargs
            As for `torch.nn.Module.state_dict`.

        Returns
        -------
        dict of str to Tensor
            The state.
        """
        result = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name in self.originals:
            result[f"{prefix}base_layer.{name}"] = self.original(name)
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.merged_adapters:
            raise ValueError(
                f"{type(self).__name__}: a state dict cannot be loaded while adapter {self.merged_adapters[0]!r} is "
                "merged into the weight; call unmerge_ first, then load it again"
            )
        super()._load_from_state_dict(*args, **kwargs)


def check_adapter_name(where: str, name: str) -> None:
    """Refuse a name that an adapter cannot have.

    Examples
    --------
    >>> check_adapter_name("here", "style")
    """
    if not name or "." in name or "lora_" in name or name in TAKEN_NAMES:
        raise ValueError(f"{where}: an adapter cannot be named {name!r}; choose another name")
