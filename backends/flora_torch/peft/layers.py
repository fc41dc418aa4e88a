"""The layers of `flora_torch` as tuner layers of PEFT: the same computation, switched, merged and taken off its way.

What differs from `flora_torch` is what PEFT's users rely on. While something is merged, the output is that of the
merged weights and of nothing else; the state dict then holds them; merging and switching are done layer by layer.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from typing_extensions import override

from flora_torch.base_weight import check_writable, own_parameter
from flora_torch.bilinear import FloraBilinear, FloraEmbeddingBag
from flora_torch.chain import Memory
from flora_torch.containers import FloraParameterCollection
from flora_torch.experts import FloraExperts
from flora_torch.flora_layer import FloraLayer
from flora_torch.kinds import wrapper_for
from flora_torch.layers import FloraConv, FloraConvTranspose, FloraEmbedding, FloraLinear, FloraParameter
from flora_torch.peft.registration import PREFIX
from flora_torch.update import TuckerUpdate

__all__ = ["FloraTunerLayer", "tuner_layer"]


class FloraTunerLayer(FloraLayer, BaseTunerLayer):  # pyright: ignore[reportIncompatibleVariableOverride]
    """What a layer needs to be switched, merged and taken off by PEFT."""

    adapter_layer_names: tuple[str, ...] = (PREFIX,)
    other_param_names: tuple[str, ...] = ()

    @property
    @override
    def _tied_weights_keys(self) -> dict[str, str]:
        # PEFT takes what is listed here for tied embeddings, and writes files without such weights itself.
        return {}

    # --- switching

    @property
    def active_adapter(self) -> list[str]:
        """The adapters that take part; PEFT's name for `active_adapters`."""
        return self._active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether the layer is its base."""
        return not self._enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the adapters that take part; unless it is for inference, only they are trained.

        Parameters
        ----------
        adapter_names : str or list of str
            The adapters; those that this layer does not have count nothing.
        inference_mode : bool
            Whether they are frozen too.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name, update in self.tucker_update.items():
            update.requires_grad_(name in names and not inference_mode)
        self._active_adapters = names

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off; to be switched off, they are unmerged.

        Parameters
        ----------
        enabled : bool
            Whether they take part.
        """
        if enabled:
            self.set_adapter(self._active_adapters)
        else:
            if self.merged_adapters:
                self.unmerge()
            self.tucker_update.requires_grad_(False)
        self._enabled = enabled

    def running(self, parameter: str = "weight") -> list[TuckerUpdate]:
        """Return the updates of a parameter that are added to the output: none, while anything is merged.

        Parameters
        ----------
        parameter : str
            The parameter.

        Returns
        -------
        list of TuckerUpdate
            In the order in which they are added.
        """
        return [] if self.merged_adapters else super().running(parameter)

    # --- merging

    @property
    def merged(self) -> bool:  # type: ignore[override]
        """Whether anything is merged; the plain layer that is called so elsewhere is `plain_with`."""
        return bool(self.merged_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W + Σ s·ΔW in the place of each adapted parameter, summed in float64 and rounded once.

        The parameter object itself is kept and comes back, so that a weight which another layer holds too stays as it
        is there.

        Parameters
        ----------
        safe_merge : bool
            Without meaning: a sum that is not finite is refused always.
        adapter_names : list of str, optional
            Which adapters; by default the active ones.

        Raises
        ------
        ValueError
            If a sum is not finite, or a parameter is computed or quantized.
        """
        del safe_merge
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.updates(name)]
        wanted = (*self.merged_adapters, *names)
        if not names:
            return
        changed = dict.fromkeys(parameter for name in wanted for parameter in self.updates(name))
        fresh: dict[str, tuple[nn.Parameter, Tensor]] = {}
        for parameter in changed:
            where = f"merge_adapter: {parameter!r} of {type(self.base_layer).__name__}"
            own = check_writable(where, self.base_layer, parameter, instead="merge_and_unload")
            fresh[parameter] = own, self.merged_value(parameter, wanted)
        for parameter, (own, value) in fresh.items():
            self.originals.setdefault(parameter, own)
            setattr(self.base_layer, parameter, nn.Parameter(value, requires_grad=own.requires_grad))
        self.merged_adapters = wanted

    def unmerge(self) -> None:
        """Give every parameter its own bits back."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for parameter, original in self.originals.items():
            # After a move it is a plain tensor.
            own = original if isinstance(original, nn.Parameter) else nn.Parameter(original, requires_grad=False)
            setattr(self.base_layer, parameter, own)
        self.originals, self.merged_adapters = {}, ()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the plain layer that takes the place of this one, without any layer of ours inside.

        Parameters
        ----------
        merge : bool
            Whether it has W + Σ s·ΔW, or W as it is now.
        safe_merge : bool
            As for `merge`.
        adapter_names : list of str, optional
            As for `merge`.

        Returns
        -------
        nn.Module
            The layer.

        Raises
        ------
        ValueError
            If a sum is not finite.
        """
        del safe_merge
        names = list(self.merged_adapters)
        if merge:
            asked = self._active_adapters if adapter_names is None else adapter_names
            names += [name for name in asked if name not in names and self.updates(name)]
        fresh = merge and set(names) != set(self.merged_adapters)
        plain = self.plain_with(names) if fresh else self.base_layer
        for name, child in list(plain.named_modules()):
            if isinstance(child, FloraTunerLayer):
                owner, _, key = name.rpartition(".")
                inner = child.unload_and_optionally_merge_module(merge, False, adapter_names)
                plain.get_submodule(owner).add_module(key, inner)
        return plain

    def replace_update(self, adapter_name: str, update: TuckerUpdate, parameter: str) -> None:
        """Put another update of the same weight in an update's place.

        Parameters
        ----------
        adapter_name : str
            The adapter.
        update : TuckerUpdate
            The new one.
        parameter : str
            The weight.
        """
        self._put(adapter_name, update, parameter)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tensors as they are, merged weights included; what is no tensor is in the config.

        Parameters
        ----------
        *args, **kwargs
            As for `torch.nn.Module.state_dict`.

        Returns
        -------
        dict of str to Tensor
            The state.
        """
        result = nn.Module.state_dict(self, *args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        # PEFT takes each key for a tensor that the model has under this name.
        for name in [*self._settings(prefix)]:
            result.pop(name, None)
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, settings in self._settings(prefix).items():
            state_dict.setdefault(name, settings)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _settings(self, prefix: str) -> dict[str, Tensor]:
        """Return what the state of each update holds beside its tensors, by its key."""
        found = [(name, m) for name, m in self.tucker_update.named_modules() if isinstance(m, TuckerUpdate)]
        return {f"{prefix}{PREFIX}.{name}._extra_state": update.get_extra_state() for name, update in found}

    # --- what else PEFT and the libraries around it ask for

    @property
    def scaling(self) -> "Scales":
        """The scale of each adapter, to be read."""
        return Scales(self)

    @property
    def in_features(self) -> int:
        """How many numbers a position of the input has; of an embedding, how many rows there are to choose from."""
        return self._size("in_features", "in_channels", "num_embeddings", "input_size", "embed_dim")

    @property
    def out_features(self) -> int:
        """How many numbers a position of the output has."""
        return self._size("out_features", "out_channels", "embedding_dim", "hidden_size", "embed_dim")

    def _size(self, *names: str) -> int:
        found = [getattr(self.base_layer, name) for name in names if hasattr(self.base_layer, name)]
        if found:
            return found[0]
        weight = getattr(self.base_layer, "weight", None)
        if weight is None or weight.dim() != 2:
            raise AttributeError(f"{type(self).__name__}: nothing is known of the sizes of its {self.base_layer}")
        # What is left is the Conv1D of transformers, whose weight is (in, out).
        return weight.shape[names[0] == "out_features"]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply an adapter's whole change by a number, for the moment: it is not saved.

        Parameters
        ----------
        adapter : str
            The adapter; one that the layer does not have counts nothing.
        scale : float
            The number.
        """
        for update in self.updates(adapter).values():
            update.multiplier = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply what the active adapters change by a number, for the moment.

        Parameters
        ----------
        scale : float
            The number.
        """
        for update in self._active_updates():
            update.multiplier *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide what the active adapters change by a number again.

        Parameters
        ----------
        scale : float, optional
            The number; by default everything that was multiplied is taken back.
        """
        for update in self._active_updates():
            update.multiplier = 1.0 if scale is None else update.multiplier / scale

    def _active_updates(self) -> Iterable[TuckerUpdate]:
        return [update for name in self._active_adapters for update in self.updates(name).values()]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what an adapter adds to ``weight``, as a dense tensor.

        Parameters
        ----------
        adapter : str
            The adapter.

        Returns
        -------
        Tensor, of the weight's shape
            The change.
        """
        update = self.updates(adapter)["weight"]
        return update.change(self.original("weight"))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell whether PEFT can make a LoRA of what an adapter adds, which needs an update of ``weight``.

        Parameters
        ----------
        adapter_name : str
            The adapter.

        Returns
        -------
        bool
            Whether it can.
        """
        return list(self.updates(adapter_name)) == ["weight"]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own would also give it the type of the base: on a 16-bit base, the updates stay in 32 bits.
        for parameter, update in self.updates(adapter_name).items():
            weight = own_parameter(self.base_layer, parameter)
            target = device or (None if weight is None else weight.device)
            if target is not None and target.type != "meta":
                update.to(target)


class Scales:
    """The scales of a layer's updates by adapter, as the dictionary that PEFT expects.

    What is written to it is dropped: PEFT writes when it hot-swaps, and only where both adapters have the same scales.

    Examples
    --------
    >>> Scales(tuner_layer(nn.Linear(3, 2), "weight")).keys()
    []
    """

    def __init__(self, layer: FloraTunerLayer) -> None:
        self._layer = layer

    def keys(self) -> list[str]:
        """Return the adapters."""
        return list(self._layer.tucker_update)

    def __contains__(self, adapter: object) -> bool:
        return adapter in self.keys()

    def __getitem__(self, adapter: str) -> float:
        updates = self._layer.updates(adapter)
        if not updates:
            raise KeyError(adapter)
        return next(iter(updates.values())).scale

    def __setitem__(self, adapter: str, scale: float) -> None:
        del adapter, scale


class TunerLinear(FloraTunerLayer, FloraLinear):
    """`FloraLinear` in PEFT."""


class TunerConv(FloraTunerLayer, FloraConv):
    """`FloraConv` in PEFT."""


class TunerConvTranspose(FloraTunerLayer, FloraConvTranspose):
    """`FloraConvTranspose` in PEFT."""


class TunerEmbedding(FloraTunerLayer, FloraEmbedding):
    """`FloraEmbedding` in PEFT."""


class TunerBilinear(FloraTunerLayer, FloraBilinear):
    """`FloraBilinear` in PEFT."""


class TunerEmbeddingBag(FloraTunerLayer, FloraEmbeddingBag):
    """`FloraEmbeddingBag` in PEFT."""


class TunerParameter(FloraTunerLayer, FloraParameter):
    """`FloraParameter` in PEFT."""

    # PEFT's properties of these names would give the frozen parameter.
    @property
    def weight(self) -> Tensor:
        """What the module calls so, with the adapters."""
        return self.__getattr__("weight")

    @property
    def bias(self) -> Tensor:
        """What the module calls so, with the adapters."""
        return self.__getattr__("bias")


class TunerExperts(TunerParameter, FloraExperts):
    """`FloraExperts` in PEFT."""


class TunerParameterCollection(TunerParameter, FloraParameterCollection):
    """`FloraParameterCollection` in PEFT."""


_KINDS: dict[type[FloraLayer], type[FloraTunerLayer]] = {
    FloraLinear: TunerLinear,
    FloraConv: TunerConv,
    FloraConvTranspose: TunerConvTranspose,
    FloraEmbedding: TunerEmbedding,
    FloraBilinear: TunerBilinear,
    FloraEmbeddingBag: TunerEmbeddingBag,
    FloraParameter: TunerParameter,
    FloraExperts: TunerExperts,
    FloraParameterCollection: TunerParameterCollection,
}


def tuner_layer(module: nn.Module, parameter: str, memory: Memory = "normal") -> FloraTunerLayer:
    """Wrap a module in the layer that adapts a parameter of it best, without an adapter yet.

    Examples
    --------
    >>> type(tuner_layer(nn.Linear(3, 2), "weight")).__name__
    'TunerLinear'
    """
    kind = _KINDS[wrapper_for(module, parameter)]
    layer = kind(module)
    layer.memory = memory
    return layer
