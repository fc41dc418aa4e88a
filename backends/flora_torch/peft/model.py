"""The tuner: which layers PEFT's config means, what goes on them, and everything that PEFT asks of the whole model."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn

from flora_tensor import TuckerTensor, add, scale
from flora_torch.base_weight import is_quantized, own_parameter, weight_names
from flora_torch.freezing import all_or_nothing
from flora_torch.initialize import default_dtype
from flora_torch.inventory import (
    check_whole,
    forget,
    switch_whole,
    updates_by_weight,
    warn_of_quantized,
    whole_of,
)
from flora_torch.kinds import layer_weights
from flora_torch.model_weights import Holder, Place, Site
from flora_torch.peft.config import FloraConfig
from flora_torch.peft.files import (
    check_file,
    check_injectable,
    checkpoint_key,
    describe,
    file_update,
    fitted_state,
    stored_state,
    without_layers,
)
from flora_torch.peft.layers import FloraTunerLayer, tuner_layer
from flora_torch.peft.registration import PREFIX
from flora_torch.row_adapters import adapters_for_rows
from flora_torch.update import TuckerUpdate

__all__ = ["FloraModel"]


class FloraModel(BaseTuner):
    """A model with FLoRA layers; made by ``peft.get_peft_model``, ``PeftModel.from_pretrained`` and the like.

    Parameters
    ----------
    model : nn.Module
        The model, which is changed in place.
    peft_config : FloraConfig, or dict of str to FloraConfig
        The config, or one for each adapter.
    adapter_name : str
        The adapter.
    low_cpu_mem_usage : bool
        Whether the adapter's parameters are left on the meta device, to be loaded.
    state_dict : dict of str to Tensor, optional
        An adapter whose keys say which modules are meant, instead of the config.

    Raises
    ------
    ValueError
        If a module or parameter that is meant cannot be adapted, or the config is that of a file for another model.

    References
    ----------
    FLoRA, arXiv 2405.14739.

    Examples
    --------
    >>> import peft
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), FloraConfig(ranks=2, target_modules=["0"]))
    >>> type(model.base_model).__name__, type(model.base_model.model[0]).__name__
    ('FloraModel', 'TunerLinear')
    """

    prefix: str = PREFIX
    tuner_layer_cls = FloraTunerLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **options: Any) -> None:
        # PEFT's own models give a table of configs, and load the tensors through this class. Others do not.
        if isinstance(peft_config, FloraConfig):
            check_injectable(peft_config)
        super().__init__(model, peft_config, adapter_name, **options)

    # --- which modules

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """Return what a model's config says; what a model calls so may be no config of Hugging Face's.

        Parameters
        ----------
        model : nn.Module
            The model.

        Returns
        -------
        dict
            The config, or one of a model of no known type.
        """
        config: Any = BaseTuner.get_model_config(model)
        return config if isinstance(config, dict) else {"model_type": "custom"}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None and peft_config.target_parameters:
            return peft_config
        kind = model_config.get("model_type")
        if peft_config.target_modules is None and kind not in self.target_module_mapping:
            raise ValueError(
                f"FloraConfig: nothing is known of what to adapt in a model of type {kind!r}; pass target_modules "
                "(names, a regular expression, or 'all-linear') or target_parameters"
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.is_from_file:
            check_file(peft_config, model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter on the layers that its config means; called by PEFT.

        Parameters
        ----------
        model : nn.Module
            The model.
        adapter_name : str
            The adapter.
        *args, **kwargs
            As for PEFT's own.

        Raises
        ------
        ValueError
            If the config cannot be followed. The model is as it was then.
        """
        before = _layers(model)
        try:
            with all_or_nothing(model):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                config: Any = self.peft_config[adapter_name]
                if missing := set(config.file_weights) - set(updates_by_weight(model, adapter_name)):
                    raise ValueError(
                        f"FloraConfig: the file changes {min(missing)!r}, which target_modules or target_parameters "
                        "leave out"
                    )
        except BaseException:
            _take_back(model, adapter_name, before)
            raise

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Adapt what ``target_parameters`` names, by whole names or their ends."""
        targets, found = tuple(peft_config.target_parameters), list[str]()
        for key, module in list(model.named_modules()):
            if PREFIX in key.split(".") or isinstance(module, FloraTunerLayer):
                continue
            name = without_layers(key)
            for parameter in weight_names(module):
                full = f"{name}.{parameter}" if name else parameter
                if full not in targets and not full.endswith(tuple(f".{target}" for target in targets)):
                    continue
                if not name:
                    raise ValueError(
                        f"FloraConfig: {full!r} belongs to the model itself, whose place nothing can take; leave it "
                        "out of target_parameters"
                    )
                parent, _, last = name.rpartition(".")
                target, owner = model.get_submodule(name), model.get_submodule(parent)
                with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                    self._create_and_replace(peft_config, adapter_name, target, last, owner, name, parameter)
                found.append(full)
        return found

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BaseTunerLayer) and not isinstance(target, FloraTunerLayer):
            raise ValueError(
                f"FloraConfig: {current_key!r} has an adapter of another method ({type(target).__name__}) already; "
                "merge or unload that one first"
            )
        key = without_layers(current_key)
        base = target.base_layer if isinstance(target, FloraTunerLayer) else target
        names = [parameter_name] if parameter_name else list(_weights_of(key, base, peft_config))
        parent = parent.base_layer if isinstance(parent, FloraTunerLayer) else parent
        for name in names:
            if peft_config.is_from_file and f"{key}.{name}" not in peft_config.file_weights:
                continue
            inside, _, own = name.rpartition(".")
            if inside:  # as the output projection of attention, which a child owns
                child = base.get_submodule(inside)
                self._adapt(peft_config, adapter_name, child, own, base, inside, f"{key}.{inside}")
            else:
                target = self._adapt(peft_config, adapter_name, target, own, parent, target_name, key)

    def _adapt(
        self, config: Any, adapter_name: str, target: nn.Module, parameter: str, parent: nn.Module, key: str, name: str
    ) -> nn.Module:
        """Put an update on one weight, and the layer that has it in the place of its module, where it is not yet."""
        layer = target if isinstance(target, FloraTunerLayer) else None
        base = target if layer is None else layer.base_layer
        if layer is not None and parameter in layer.updates(adapter_name):
            return layer  # meant twice
        place = Place(name, base, layer, parent, key)
        full = f"{name}.{parameter}"
        weight: Any = getattr(base, parameter, torch.empty(0))
        site = Site(full, weight, (Holder(base, parameter, (place,)),))
        try:
            update = file_update(config, site) if config.is_from_file else _fresh_update(config, site)
            wrapper = tuner_layer(base, parameter, config.memory) if layer is None else layer
            wrapper.install(adapter_name, update, parameter=parameter)
        except (ValueError, TypeError) as error:
            raise type(error)(str(error) if full in str(error) else f"FloraConfig: {full}: {error}") from error
        if layer is None:
            self._replace_module(parent, key, wrapper, base)
        return wrapper

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        del child  # our layers are on its device already
        parent.add_module(child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Give updates 32 bits, as they are made on a 16-bit base; with ``False`` the type of the base."""
        for layer in _layers(self.model):
            for parameter, update in layer.updates(adapter_name).items():
                weight = own_parameter(layer.base_layer, parameter)
                if autocast_adapter_dtype:
                    update.to(default_dtype(update.core.dtype))
                elif weight is not None and not is_quantized(layer.base_layer):
                    update.to(weight.dtype)

    # --- merging and taking off

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the weights, all or nothing.

        Parameters
        ----------
        adapter_names : list of str, optional
            Which; by default the active ones.
        safe_merge : bool
            Without meaning: a sum that is not finite is refused always.

        Raises
        ------
        ValueError
            If a sum is not finite, or a weight is computed or quantized. Nothing is merged then.
        """
        before = [(layer, layer.merged_adapters) for layer in _layers(self.model)]
        try:
            super().merge_adapter(adapter_names, safe_merge=safe_merge)
        except BaseException:
            for layer, merged in before:
                if layer.merged_adapters != merged:
                    layer.unmerge()
                    if merged:
                        layer.merge(adapter_names=list(merged))
            raise

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            names = kwargs.get("adapter_names")
            for layer in _layers(self.model):
                # Refused before anything is taken off.
                asked = layer.active_adapters if names is None else names
                layer.plain_with(dict.fromkeys([*layer.merged_adapters, *asked]))
            warn_of_quantized("merge_and_unload", self.model, _layers(self.model))
        switch_whole(self.model, self.active_adapters if merge else ())
        for place, local, note in whole_of(self.model):
            forget(place.module, local, note.adapter_name)
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)

    # --- tensors that an adapter has whole

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the adapters that take part.

        Parameters
        ----------
        adapter_name : str or list of str
            The adapters.
        inference_mode : bool
            Whether they are frozen; else they, and no others, are trained.

        Raises
        ------
        ValueError
            If two of them replace one tensor whole.
        """
        check_whole(self.model, "set_adapter", [adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        switch_whole(self.model, self.active_adapters)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        switch_whole(self.model, self.active_adapters if enabled else ())

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off.

        Parameters
        ----------
        adapter_name : str
            The adapter.

        Raises
        ------
        ValueError
            If there is none of this name, or it is merged.
        """
        super().delete_adapter(adapter_name)
        switch_whole(self.model, self.active_adapters)
        for place, local, note in whole_of(self.model):
            if note.adapter_name == adapter_name:
                forget(place.module, local, adapter_name)

    # --- several adapters

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Make a new adapter whose change is Σ w·ΔW of others, exactly; its ranks are the sums of theirs.

        Parameters
        ----------
        adapters : list of str
            The adapters.
        weights : list of float
            w, one for each.
        adapter_name : str
            The new adapter's name; it is not active.
        combination_type : {"cat", "linear"}
            Both are the exact sum; of PEFT's others there is none.

        Raises
        ------
        ValueError
            If an adapter is unknown, the name is taken, the numbers of adapters and weights differ, the combination is
            another one, or changes of one weight cannot be summed.
        """
        if combination_type not in ("cat", "linear"):
            raise ValueError(
                f"add_weighted_adapter: combination_type is {combination_type!r}; pass 'cat' or 'linear', which give "
                "the exact sum, save it, and make it smaller with flora_tensor.round_adapter"
            )
        self._check_known("add_weighted_adapter", adapters)
        if adapter_name in self.peft_config or not adapters or len(adapters) != len(weights):
            raise ValueError(
                f"add_weighted_adapter: {len(adapters)} adapters, {len(weights)} weights, and the new name "
                f"{adapter_name!r}; pass one weight for each adapter, and a name that is not taken"
            )
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        if any(config.whole for config in configs):
            raise ValueError("add_weighted_adapter: tensors that an adapter has whole cannot be summed; merge instead")
        sums = [
            (layer, parameter, _weighted_sum(layer, parameter, dict(zip(adapters, weights))))
            for layer in _layers(self.model)
            for parameter in layer.parameter_names
            if any(parameter in layer.updates(name) for name in adapters)
        ]
        for layer, parameter, update in sums:
            active = list(layer.active_adapters)
            layer.install(adapter_name, update.requires_grad_(False), parameter=parameter)
            layer.set_adapter(active, inference_mode=self.peft_config[adapters[0]].inference_mode)
        self.peft_config[adapter_name] = configs[0].of_no_file()

    def _check_known(self, where: str, names: Iterable[str]) -> None:
        """Refuse adapters that the model does not have."""
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"{where}: the model has no adapter {name!r}; it has {', '.join(self.peft_config)}")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None, None, None]:
        """Give each row of the batch the adapter that ``adapter_names`` names for it; ``"__base__"`` is none."""
        del args
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names: the model is in training; call eval() first, or use set_adapter")
        self._check_known("adapter_names", sorted({*names} - {"__base__"}))
        beams = kwargs.get("num_beams") or 1
        rows = [None if name == "__base__" else name for name in names for _ in range(beams)]
        with adapters_for_rows(self.model, rows):
            yield

    # --- files

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        own = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        stored = stored_state(model, adapter_name, own)
        describe(config, model, adapter_name, stored)
        return stored

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return checkpoint_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return fitted_state(model, config, adapter_name, state_dict)


def _layers(model: nn.Module) -> list[FloraTunerLayer]:
    return [module for module in model.modules() if isinstance(module, FloraTunerLayer)]


def _take_back(model: nn.Module, adapter_name: str, before: list[FloraTunerLayer]) -> None:
    """Take an adapter that could not be put on everything off again, with the layers that were made for it."""
    layers = [(key, module) for key, module in model.named_modules() if isinstance(module, FloraTunerLayer)]
    # A layer comes before those inside it.
    for key, layer in reversed(layers):
        if adapter_name in layer.tucker_update:
            layer.remove_adapter(adapter_name)
        if layer not in before:
            parent, _, last = key.rpartition(".")
            model.get_submodule(parent).add_module(last, layer.base_layer)


def _weights_of(key: str, base: nn.Module, config: FloraConfig) -> Iterable[str]:
    """List the weights of a module that are meant where the module is."""
    names = layer_weights(base)
    if config.is_from_file:
        own = [name.rpartition(".")[2] for name in config.file_weights if name.rpartition(".")[0] == key]
        return dict.fromkeys([*own, *names])
    if not names:
        own = ", ".join(f"{key}.{name}" for name, _ in base.named_parameters(recurse=False)) or "none"
        raise ValueError(
            f"FloraConfig: target module {key!r} is a {type(base).__name__}, which is no layer of a known kind; pass "
            f"its parameters in target_parameters (it has {own})"
        )
    return names


def _fresh_update(config: FloraConfig, site: Site) -> TuckerUpdate:
    update = config.options_for(site.name).plan(site).update
    if config.init_weights is False:
        nn.init.normal_(update.core, std=update.core.numel() ** -0.5)
    return update


def _weighted_sum(layer: FloraTunerLayer, parameter: str, weights: dict[str, float]) -> TuckerUpdate:
    """Make the update whose change is the weighted sum of others' changes of one parameter."""
    found = [(w, layer.updates(name)[parameter]) for name, w in weights.items() if parameter in layer.updates(name)]
    first = found[0][1]
    if any(update.magnitude is not None for _, update in found):
        raise ValueError(
            "add_weighted_adapter: changes that rescale a weight by a magnitude do not add up; merge instead"
        )
    if any(update.arrangement != first.arrangement for _, update in found):
        raise ValueError(f"add_weighted_adapter: the adapters arrange {parameter!r} in different ways; merge instead")
    total: TuckerTensor | None = None
    for weight, update in found:
        term = scale(update.exported(), weight * update.scale)
        total = term if total is None else add(total, term)
    assert total is not None
    tucker = total.map(lambda a: a.detach().clone())
    return TuckerUpdate(tucker, first.shape, arrangement=first.arrangement)
