"""What a model does on data, layer by layer: the second moments of the inputs.

Everything streams: hooks see one layer's input at a time, add it to a sum of the weight's size or less, and let it go.
"""

import errno
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from typing_extensions import override

from flora_tensor import Arrangement
from flora_tensor._typing import PathLike
from flora_tensor._warnings import warn_user
from flora_tensor.moments import Moments, save_moments
from flora_torch._sharding import in_several_processes, is_first_process, summed
from flora_torch.base_weight import describe
from flora_torch.functional import ConvGeometry
from flora_torch.initialize import default_dtype
from flora_torch.kinds import wrapper_for
from flora_torch.layers import FloraConv, FloraConvTranspose, FloraEmbedding, FloraLinear
from flora_torch.model_weights import Holder, Site
from flora_torch.patterns import Pattern
from flora_torch.selection import select
from flora_torch.weight_layer import is_conv1d_of_transformers, is_read_by_its_parent

__all__ = ["collect_moments"]

# How many numbers of unfolded patches are held at once: 64 MiB in float32.
_AT_ONCE = 1 << 24


def collect_moments(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    path: PathLike | None = None,
    device: torch.device | str | None = None,
    target_modules: "Pattern | Sequence[Pattern] | None" = None,
    exclude_modules: "Pattern | Sequence[Pattern] | None" = None,
    patches: bool = True,
    limit: int = 4096,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    overwrite: bool = False,
    mask: "str | Callable[[Any], Tensor] | None" = None,
    sum_over_processes: bool = True,
) -> Moments:
    """Run a model over batches and take the second moment E[x xᵀ] of what each weight is multiplied by.

    The mean goes over samples, positions (tokens, or the places of a kernel) and groups, each counted once; padding
    counts as the layer sees it, unless ``mask`` tells where it is. The model runs in evaluation mode, without
    gradients, and is left as it was.

    ================================ ========== ==================================================================
    layer                            axes       moment
    ================================ ========== ==================================================================
    linear                           ``i``      of the features
    convolution                      ``i h w``  of whole patches, where they have at most ``limit`` entries
    convolution                      ``i``      of the channels within a group, its mean over the kernel's places
    transposed convolution           ``o``      of the channels of one position; zero between groups
    ``Conv1D`` of transformers       ``o``      of the features
    embedding                        ``o``      the share of each row among the looked-up ones, a diagonal
    attention, ``in_proj_weight``    ``i``      of queries, keys and values together; once, where they are one tensor
    attention, ``q_proj_weight``, …  ``i``      of the queries, the keys or the values
    attention, ``out_proj``          ``i``      of the heads' results, which are computed once more for this
    ================================ ========== ==================================================================

    Where even the features or channels are more than ``limit``, the diagonal alone is kept, as a vector. A weight
    that several layers hold gets the mean over the inputs of all; one held by an embedding too, that of the others.
    In several processes (torch.distributed) each sees its own batches, and the mean is over those of all.

    Parameters
    ----------
    model : nn.Module
        The model, with or without adapters.
    batches : iterable
        Inputs: a tensor is passed as it is, a mapping by keyword, a tuple or list by position; see ``forward``.
    path : path, optional
        Where to write the moments, for ``flora-tensor extract --calibration``.
    device : torch.device or str, optional
        Where the sums are kept; by default where the inputs are.
    target_modules, exclude_modules : pattern or sequence of patterns, optional
        As for `attach`.
    patches : bool
        Whether convolutions keep the moment of whole patches, or always that of their channels.
    limit : int
        The largest matrix, in rows.
    forward : callable, optional
        What is called as ``forward(model, batch)`` in the place of the rule above; for a loader of images and labels,
        ``lambda model, batch: model(batch[0])``.
    overwrite : bool
        Whether a file that exists is replaced.
    mask : str or callable, optional
        Which tokens count, such as ``"attention_mask"``: the name of a batch's entry, or what gives it for a batch, of
        shape (batch, tokens), true or nonzero where a token counts. It holds for look-ups and for features whose
        leading axes are those of the mask, or its entries in a row; of any other input, all is counted.
    sum_over_processes : bool
        With ``False``, each process has the moments of its own batches. Otherwise all must call this, and the first
        writes the file.

    Returns
    -------
    Moments
        Tensors of shape (I, I) or (I,) by the weights' names, symmetric, with ``axes``, ``counts`` and ``aliases``.
        float32, or the input's type where that is wider.

    Raises
    ------
    ValueError
        If no layer was reached, an entry is not finite, a pattern matches nothing, an input does not fit its layer, or
        the mask fits no input.
    FileExistsError, OSError
        As for `flora_tensor.save_moments`.

    Warns
    -----
    FloraWarning
        If a layer was never called: some parents read ``weight`` in its place.

    References
    ----------
    Paischer et al., *EVA: parameter efficient fine-tuning via explained variance adaptation*, arXiv 2410.07170; Yang et
    al., *CorDA*, arXiv 2406.05223, equation 1.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 2))
    >>> moments = collect_moments(model, [torch.ones(5, 3, 4, 4), torch.ones(1, 3, 4, 4)])
    >>> {name: (tuple(c.shape), moments.axes[name], moments.counts[name]) for name, c in moments.items()}
    {'0.weight': ((27, 27), 'i h w', 24), '2.weight': ((32, 32), 'i', 6)}
    """
    if path is not None and not overwrite and os.path.lexists(path):
        # Said before the model has run over all batches.
        raise FileExistsError(errno.EEXIST, "collect_moments: the file exists; pass overwrite=True", str(path))
    targets = [
        site for site in select(model, target_modules, exclude_modules, where="collect_moments") if _has_input(site)
    ]
    sums = {site.name: [_sum_for(holder, patches, limit, device) for holder in site.holders] for site in targets}
    every = [total for each in sums.values() for total in each]
    with ExitStack() as stack:
        for total in every:
            stack.enter_context(_watched(total))
        stack.enter_context(evaluating(model))
        stack.enter_context(_layers_called())
        stack.enter_context(torch.no_grad())
        for batch in batches:
            _tell_mask(every, batch, mask)
            _run(model, batch, forward)
    if mask is not None and not any(total.masked for total in every) and any(total.n_rows for total in every):
        raise ValueError("collect_moments: the mask fits no input of a layer; pass one of shape (batch, tokens)")
    shared = sum_over_processes and in_several_processes()
    for total in every if shared else ():
        total.sum_over_processes()
    moments = _moments(targets, sums)
    if path is not None and (not shared or is_first_process()):
        save_moments(path, moments, overwrite=overwrite)
    return moments


def _has_input(site: Site) -> bool:
    known = (FloraLinear, FloraConv, FloraConvTranspose, FloraEmbedding)
    return all(
        wrapper_for(h.module, h.parameter) in known or isinstance(h.module, nn.MultiheadAttention) for h in site.holders
    )


def _tell_mask(sums: "list[_Sum]", batch: Any, mask: "str | Callable[[Any], Tensor] | None") -> None:
    """Let all sums know which tokens of the next batch count."""
    if mask is None:
        return
    if isinstance(mask, str) and not (isinstance(batch, Mapping) and mask in batch):
        raise ValueError(
            f"collect_moments: mask is {mask!r}, and a batch has no such entry; pass batches by keyword, or a callable"
        )
    counts: Tensor = batch[mask] if isinstance(mask, str) else mask(batch)
    for total in sums:
        total.counts = counts.bool()


def _run(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None) -> Any:
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@contextmanager
def evaluating(model: nn.Module) -> Generator[None, None, None]:
    """Put every module into evaluation mode, and back into the mode that each was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _layers_called() -> Generator[None, None, None]:
    """Keep transformers of torch from reading their layers' weights in the place of calling them."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _watched(total: "_Sum") -> Generator[None, None, None]:
    """Add every input of a layer to its sum."""

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for inputs in total.inputs(module, args, kwargs):
            # Autocast would take the products in 16 bits.
            with torch.autocast(inputs.device.type, enabled=False):
                total.see(total.counted(inputs.detach()))

    handle = total.watched.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Sum:
    """The sum of x xᵀ over a layer's inputs, or of its diagonal, and the number of inputs."""

    def __init__(self, holder: Holder, axes: str, size: int, limit: int, device: Any) -> None:
        self.holder, self.axes, self.size, self.device = holder, axes, size, device
        self.diagonal = size > limit
        self.total: Tensor | None = None
        self.n_rows = 0
        # How many rows one input makes.
        self.places = 1
        # Which tokens of the batch count, where that is known, and whether it was ever used.
        self.counts: Tensor | None = None
        self.masked = False

    @property
    def watched(self) -> nn.Module:
        """The module whose calls bring the inputs."""
        # The wrapper of an adapted layer gets the base's own input, and does not always call the base.
        return self.holder.wrapper or self.holder.module

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return what the weight is multiplied by in one call."""
        del module
        found = args[0] if args else kwargs.get("input", kwargs.get("x"))
        return [found] if isinstance(found, Tensor) else []

    def counted(self, inputs: Tensor) -> Tensor:
        """Return those tokens of an input that count, as (tokens, features); all of it where the mask does not fit."""
        counts, lead = self.counts, inputs.shape[:-1]
        if counts is None or lead not in (counts.shape, (counts.numel(),)):
            return inputs
        self.masked = True
        return inputs[counts.reshape(lead).to(inputs.device)]

    def sum_over_processes(self) -> None:
        """Add up what every process has summed; those that the layer was not reached in have nothing to add."""
        weight = describe(self.holder.module, self.holder.parameter)
        assert weight is not None
        is_wide = self.total is not None and self.total.dtype == torch.float64
        n_rows, n_wide = summed(torch.tensor([self.n_rows, int(is_wide)], device=weight.device)).tolist()
        if not n_rows:
            return
        dtype = torch.float64 if n_wide else torch.float32
        # Processes talk about tensors on the devices that the model is on.
        shape = (self.size,) if self.diagonal else (self.size, self.size)
        mine = torch.zeros(shape, dtype=dtype, device=weight.device)
        home = self.device or (mine if self.total is None else self.total).device
        self.total = summed(mine if self.total is None else self.total.to(mine)).to(home)
        self.n_rows = n_rows

    def see(self, inputs: Tensor) -> None:
        """Add all x of one input of the layer."""
        for rows in self.rows(inputs):
            if rows.shape[1] != self.size:
                raise ValueError(
                    f"collect_moments: {self.holder.names[0]!r} got an input of shape {tuple(inputs.shape)}, which has "
                    f"no axis of its {self.size} inputs where it should be; exclude its module"
                )
            wide = rows.to(default_dtype(rows.dtype))
            self.add(wide.square().sum(0) if self.diagonal else wide.mT @ wide, len(rows))

    def add(self, term: Tensor, n_rows: int) -> None:
        """Add to the sum, where it is kept."""
        term = term if self.device is None else term.to(self.device)
        self.total = term if self.total is None else self.total.add_(term)
        self.n_rows += n_rows

    def rows(self, inputs: Tensor) -> Iterator[Tensor]:
        """Yield the x of an input as the rows (n, size) of matrices."""
        yield inputs.reshape(-1, inputs.shape[-1])


class _RowCounts(_Sum):
    """How often each row of an embedding was looked up: x is one-hot, so that x xᵀ is diagonal."""

    @override
    def counted(self, inputs: Tensor) -> Tensor:
        if self.counts is None or inputs.shape not in (self.counts.shape, (self.counts.numel(),)):
            return inputs
        self.masked = True
        return inputs[self.counts.reshape(inputs.shape).to(inputs.device)]

    @override
    def see(self, inputs: Tensor) -> None:
        rows = inputs.reshape(-1).to(torch.int64)
        self.add(torch.bincount(rows, minlength=self.size), len(rows))


class _Projected(_Sum):
    """What the in-projections of attention multiply: queries, keys and values."""

    @override
    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        names = ("query", "key", "value")
        given = {**kwargs, **dict(zip(names, args))}
        first = self.holder.parameter[0]
        chosen = [given[name] for name in names if self.holder.parameter == "in_proj_weight" or name[0] == first]
        # Of self-attention, each token is multiplied by the whole weight, and counts once.
        return chosen if any(x is not chosen[0] for x in chosen) else chosen[:1]


class _HeadResults(_Sum):
    """What the out-projection of attention multiplies: it is read by its parent, whose call is repeated without it."""

    @property
    @override
    def watched(self) -> nn.Module:
        parent = self.holder.places[0].parent
        assert parent is not None
        return parent

    @override
    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        attention: Any = module
        like = attention.out_proj.weight
        # An attribute of the object comes before nn.Module's own look-up of a child.
        identity = torch.eye(self.size, dtype=like.dtype, device=like.device)
        vars(attention)["out_proj"] = SimpleNamespace(weight=identity, bias=like.new_zeros(self.size))
        try:
            return [attention.forward(*args, **kwargs)[0]]
        finally:
            del vars(attention)["out_proj"]


class _Positions(_Sum):
    """The channels of a transposed convolution's input, position by position."""

    @override
    def counted(self, inputs: Tensor) -> Tensor:
        return inputs

    @override
    def rows(self, inputs: Tensor) -> Iterator[Tensor]:
        base: Any = self.holder.module
        channels = inputs.dim() - len(base.kernel_size) - 1
        yield inputs.movedim(channels, -1).reshape(-1, inputs.shape[channels])


class _Patches(_Sum):
    """What a convolution's kernel lies over, group by group: as one vector, or place by place."""

    def __init__(self, holder: Holder, axes: str, size: int, limit: int, device: Any) -> None:
        super().__init__(holder, axes, size, limit, device)
        self.whole = len(axes.split()) > 1
        kernel: Any = holder.module.kernel_size
        self.places = 1 if self.whole else math.prod(kernel)

    @override
    def counted(self, inputs: Tensor) -> Tensor:
        return inputs

    @override
    def rows(self, inputs: Tensor) -> Iterator[Tensor]:
        base: Any = self.holder.module
        n = len(base.kernel_size)
        view = _patches(inputs if inputs.dim() == n + 2 else inputs.unsqueeze(0), base)
        # From (batch, groups, channels, *positions, *kernel) to (batch, *positions, groups, channels, *kernel).
        order = (0, *range(3, 3 + n), 1, 2, *range(3 + n, 3 + 2 * n))
        view = view.unflatten(1, (base.groups, -1)).permute(order)
        for part in _parts(view):
            patches = part.flatten(n + 3)
            rows = patches if self.whole else patches.mT
            yield rows.flatten(n + 2).flatten(0, n + 1) if self.whole else rows.flatten(0, n + 2)


def _patches(x: Tensor, base: Any) -> Tensor:
    """Return what the kernel lies over at each position, a view (batch, channels, *positions, *kernel) of the input."""
    n = len(base.kernel_size)
    pads = ConvGeometry(base.kernel_size, base.stride, base.dilation, base.padding).pads
    # `pad` counts the axes from the last one.
    flat = [width for pair in reversed(pads) for width in pair]
    if any(flat):
        x = nnf.pad(x, flat, "constant" if base.padding_mode == "zeros" else base.padding_mode)
    for axis, (size, step, spread) in enumerate(zip(base.kernel_size, base.stride, base.dilation)):
        x = x.unfold(2 + axis, spread * (size - 1) + 1, step)
        x = x[..., ::spread]
    assert x.dim() == 2 + 2 * n
    return x


def _parts(view: Tensor) -> Iterator[Tensor]:
    """Cut a view along its first two axes, so that the copy of a part stays below `_AT_ONCE` numbers."""
    per_sample = max(1, math.prod(view.shape[1:]))
    for samples in view.split(max(1, _AT_ONCE // per_sample)):
        per_line = max(1, samples.numel() // samples.shape[1])
        yield from samples.split(max(1, _AT_ONCE // per_line), dim=1)


def _sum_for(holder: Holder, patches: bool, limit: int, device: Any) -> _Sum:
    """Choose what is summed for a layer; see the table of `collect_moments`."""
    weight = describe(holder.module, holder.parameter)
    assert weight is not None
    kind = wrapper_for(holder.module, holder.parameter)
    first, *rest = Arrangement.native(len(weight.shape)).pattern.split()
    if kind is FloraEmbedding:
        return _RowCounts(holder, first, weight.shape[0], 0, device)
    if kind is FloraConvTranspose:
        return _Positions(holder, first, weight.shape[0], limit, device)
    if kind is FloraConv:
        size = math.prod(weight.shape[1:])
        if patches and size <= limit:
            return _Patches(holder, " ".join(rest), size, limit, device)
        return _Patches(holder, rest[0], weight.shape[1], limit, device)
    if isinstance(holder.module, nn.MultiheadAttention):
        return _Projected(holder, rest[0], weight.shape[1], limit, device)
    if is_read_by_its_parent(holder.module) and isinstance(holder.places[0].parent, nn.MultiheadAttention):
        return _HeadResults(holder, rest[0], weight.shape[1], limit, device)
    transposed = is_conv1d_of_transformers(holder.module)
    return _Sum(holder, first if transposed else rest[0], weight.shape[0 if transposed else 1], limit, device)


def _moments(targets: list[Site], sums: Mapping[str, list[_Sum]]) -> Moments:
    """Divide the sums, and put those of a weight's several layers together."""
    values: dict[str, Tensor] = {}
    axes: dict[str, str] = {}
    counts: dict[str, int] = {}
    for site in targets:
        reached = [total for total in sums[site.name] if total.total is not None and total.n_rows]
        if not reached:
            continue
        # The frequencies of tokens say least of a matrix that also multiplies.
        chosen = min(reached, key=lambda total: isinstance(total, _RowCounts))
        same = [total for total in reached if (type(total), total.axes) == (type(chosen), chosen.axes)]
        values[site.name] = _mean(site.name, same)
        axes[site.name] = chosen.axes
        counts[site.name] = sum(total.n_rows // total.places for total in same)
    missing = [site.name for site in targets if site.name not in values]
    if not values:
        raise ValueError(f"collect_moments: no layer got an input, of {len(targets)} that were watched; pass batches")
    if missing:
        warn_user(
            f"collect_moments: {', '.join(map(repr, missing[:5]))}{' …' * (len(missing) > 5)} never got an input and "
            "have no moment: the layer was not called"
        )
    aliases = {site.name: [name for name in site.names if name != site.name] for site in targets}
    return Moments(values, axes, counts, aliases)


def _mean(name: str, sums: list[_Sum]) -> Tensor:
    """Return the moment over several layers: exactly symmetric, which a product by blocks need not be."""
    first, *rest = sums
    assert first.total is not None
    total = first.total
    for other in rest:
        assert other.total is not None
        total = total + other.total.to(total.device)
    mean = total / sum(each.n_rows for each in sums)
    if not bool(torch.isfinite(mean).all()):
        raise ValueError(
            f"collect_moments: the moment of {name!r} has NaN or infinite entries; look for them in the batches, or "
            "run the model in a wider type"
        )
    if mean.dim() == 1:
        return mean
    mean = (mean + mean.mT) / 2
    groups: Any = first.holder.module.groups if isinstance(first, _Positions) else 1
    if groups == 1:
        return mean
    # No output sees two groups, so what these have in common changes none.
    group = torch.arange(len(mean), device=mean.device) // (len(mean) // groups)
    return torch.where(group[:, None] == group, mean, 0.0)
