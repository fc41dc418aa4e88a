"""Aids for training adapters: parameter groups for the optimizer, and factors that stay orthonormal."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

import flora_tensor as ft
from flora_torch._sharding import as_parts, assign_, gathered, reshard
from flora_torch.initialize import default_dtype
from flora_torch.layers import FloraLayer
from flora_torch.update import TuckerUpdate

__all__ = ["parameter_groups", "retract_"]


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    core_lr: float | None = None,
    factor_lr: float | None = None,
    weight_decay: float = 0.0,
    core_weight_decay: float | None = None,
    factor_weight_decay: float | None = None,
    adapter_name: str | None = None,
) -> list[dict[str, Any]]:
    """Sort what is trained into groups for an optimizer: cores, factors, and whatever else of the model is trained.

    Every parameter that requires a gradient is in exactly one group, a tied one under its first name. LoRA+ found that
    the matrix that starts at zero wants the larger rate, about 16 times the other's; of a Tucker update that starts at
    zero this is the core. Weight decay shrinks factors without end, since only the product counts; with
    ``factor_weight_decay=0`` it falls on the core alone.

    Parameters
    ----------
    model : nn.Module
        A model with adapters.
    lr : float
        The learning rate of everything that has no other.
    core_lr, factor_lr : float, optional
        Those of cores and of factors.
    weight_decay : float
        The weight decay of everything that has no other.
    core_weight_decay, factor_weight_decay : float, optional
        Those of cores and of factors.
    adapter_name : str, optional
        One adapter alone, and nothing else of the model; by default everything that is trained.

    Returns
    -------
    list of dict
        For any optimizer of `torch.optim`: ``params``, ``param_names``, ``lr``, ``weight_decay``, and ``name``, which
        is ``"<adapter>.core"``, ``"<adapter>.factors"``, ``"<adapter>.others"`` or ``"model"``. Empty ones are left
        out.

    Raises
    ------
    ValueError
        If nothing of this kind is trained, or a rate or a decay is negative.

    References
    ----------
    Hayou, Ghosh and Yu, *LoRA+: efficient low rank adaptation of large models*, ICML 2024, arXiv 2402.12354.

    Examples
    --------
    >>> from flora_torch import attach
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = attach(model, ranks=2)
    >>> optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, core_lr=1.6e-2))
    >>> [(group["name"], group["lr"], len(group["params"])) for group in optimizer.param_groups]
    [('default.core', 0.016, 1), ('default.factors', 0.001, 2)]
    """
    given = {
        "core": (core_lr, core_weight_decay),
        "factors": (factor_lr, factor_weight_decay),
        "others": (None, None),
        "model": (None, None),
    }
    options: dict[str, dict[str, float]] = {}
    for kind, (rate, decay) in given.items():
        options[kind] = {
            "lr": lr if rate is None else rate,
            "weight_decay": weight_decay if decay is None else decay,
        }
        if min(options[kind].values()) < 0.0:
            raise ValueError(f"parameter_groups: {options[kind]} for the {kind}; pass numbers of 0 or more")
    reshard(model)
    owners = {id(p): owner for *owner, p in _owned(model)}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        adapter, kind = owners.get(id(parameter), (None, "model"))
        if parameter.requires_grad and adapter_name in (None, adapter):
            title = kind if adapter is None else f"{adapter}.{kind}"
            group = groups.setdefault(title, {"name": title, "params": [], "param_names": [], **options[kind]})
            group["params"].append(parameter)
            group["param_names"].append(name)
    if not groups:
        what = "nothing of the model" if adapter_name is None else f"no adapter {adapter_name!r} of the model"
        raise ValueError(f"parameter_groups: {what} is trained; attach an adapter first")
    return list(groups.values())


def _owned(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield adapter, kind and parameter for all that belongs to updates."""
    for adapter, update in _updates(model):
        for name, parameter in update.named_parameters():
            # The last part but one is the name where a parametrization stands between.
            parts = name.split(".")
            if "core" in parts:
                yield adapter, "core", parameter
            else:
                yield adapter, "factors" if any(p.startswith("factor_") for p in parts) else "others", parameter


def _updates(model: nn.Module) -> Iterator[tuple[str, TuckerUpdate]]:
    for layer in model.modules():
        if isinstance(layer, FloraLayer):
            for adapter in layer.tucker_update:
                for update in layer.updates(adapter).values():
                    yield adapter, update


def retract_(model: nn.Module, adapter_name: str | None = None) -> None:
    """Make all factors orthonormal again, in place, without changing ΔW.

    Each factor is replaced by Q of U = Q R, the diagonal of R positive, and the core multiplied by R: ΔW is the same to
    rounding. Called after every step of an optimizer it keeps the factors on the Stiefel manifold, so that ‖ΔW‖ is
    s ‖G‖, and no factor grows at the cost of another:

        optimizer.register_step_post_hook(lambda *_: flora_torch.retract_(model))

    This, and not `torch.nn.utils.parametrizations.orthogonal`, is the way that is meant: parameters, state dict, files,
    copies and pickles stay as they are, and a step costs one thin QR a factor, where the parametrization renames the
    parameters, refuses to be pickled, and builds the factor anew in every forward pass.

    Momentum is not carried over: after the retraction the optimizer's averages are those of the old coordinates. With a
    retraction after each step R is I + O(learning rate) and the difference of that order; after rare ones,
    begin with a fresh optimizer.

    Parameters
    ----------
    model : nn.Module
        A model with adapters, sharded by ``fully_shard`` or not. Tied updates are retracted once.
    adapter_name : str, optional
        One adapter; by default all.

    Raises
    ------
    ValueError
        If there is no such adapter, a factor has more columns than rows or a parametrization, or a number is not
        finite. Nothing is changed then.

    References
    ----------
    Absil, Mahony and Sepulchre, *Optimization algorithms on matrix manifolds* (2008), example 4.1.3.

    Examples
    --------
    >>> from flora_torch import FloraLinear
    >>> layer = FloraLinear(nn.Linear(4, 3), ranks=2)
    >>> update = layer.tucker_update["default"]
    >>> with torch.no_grad():
    ...     _ = update.core.fill_(1.0), update.factor_0.mul_(5.0)
    >>> before = update.delta()
    >>> retract_(layer)
    >>> bool(torch.allclose(update.factor_0.mT @ update.factor_0, torch.eye(2), atol=1e-6))
    True
    >>> bool(torch.allclose(update.delta(), before, atol=1e-6))
    True
    """
    as_parts("retract_", model)
    found = {id(update): (name, update) for name, update in _updates(model) if adapter_name in (None, name)}
    if not found:
        what = "no adapter" if adapter_name is None else f"no adapter {adapter_name!r}"
        raise ValueError(f"retract_: the model has {what}; call attach first")
    with torch.no_grad():
        pairs = [pair for name, update in found.values() for pair in _retracted(name, update)]
        for parameter, value in pairs:
            assign_(parameter, value)


def _retracted(adapter: str, update: TuckerUpdate) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the parameters of an update with their new values."""
    if is_parametrized(update):
        raise ValueError(
            f"retract_: adapter {adapter!r} has a parametrization of torch, which makes the factor itself; remove it, "
            "or leave the retraction out"
        )
    core = gathered(update.core.detach())
    wide = default_dtype(core.dtype)
    pairs: list[tuple[nn.Parameter, Tensor]] = []
    # Autocast would take the products in 16 bits.
    with torch.autocast(core.device.type, enabled=False):
        core = core.to(wide)
        for mode, factor in enumerate(update.factors):
            if factor is None:
                continue
            if factor.shape[0] < factor.shape[1]:
                raise ValueError(
                    f"retract_: factor {mode} of adapter {adapter!r} is of shape {tuple(factor.shape)}; its columns "
                    "cannot be orthonormal; lower its rank with flora_tensor.round_tucker first"
                )
            q, r = torch.linalg.qr(gathered(factor.detach()).to(wide))
            # With a positive diagonal Q is the factor itself where that is orthonormal already.
            sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(wide)
            core = ft.mode_dot(core, r * sign[:, None], mode)
            pairs.append((update.get_parameter(f"factor_{mode}"), q * sign))
    pairs.append((update.core, core))
    if not all(bool(torch.isfinite(value).all()) for _, value in pairs):
        raise ValueError(f"retract_: adapter {adapter!r} has NaN or infinite entries; training has diverged")
    return pairs
