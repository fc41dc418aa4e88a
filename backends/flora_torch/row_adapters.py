"""Batches whose rows have adapters of their own."""

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from flora_torch.in_place import refuse_merged
from flora_torch.inventory import check_known, layers_of, whole_of
from flora_torch.layers import FloraLayer
from flora_torch.model_weights import places
from flora_torch.rows import RowAdapters, RowPlan

__all__ = ["adapters_for_rows"]


@contextmanager
def adapters_for_rows(model: nn.Module, rows: RowAdapters) -> Generator[nn.Module, None, None]:
    """Give each row of the batch its own adapters, inside a ``with`` block.

    The frozen layers run once for the whole batch, and each adapter for its rows alone, so that a row's output is the
    one that it has in a batch of its own, to rounding. Which adapters are active does not count meanwhile; the weights
    that `activate` gave them do. Rows are the first axis of the inputs that the adapted layers see: models that put
    another axis first, or fold others into it, cannot be run so, and are refused where the lengths differ. Positions
    that an embedding looks up once, as a batch of one row, are looked up for every row. With gradient checkpointing,
    the backward pass runs layers again and belongs into the block too.

    Parameters
    ----------
    model : nn.Module
        A model with adapters.
    rows : sequence of (str, None or sequence of str)
        For each row an adapter's name, ``None`` for the model itself, or several names that add up.

    Yields
    ------
    nn.Module
        The model.

    Raises
    ------
    ValueError
        If the model has no such adapter, one of them changes a layer whose product with the weight is not known or
        replaces tensors whole, an adapter is merged in place, or the context is entered twice; and, when the model is
        called, if an input's rows are not as many.

    References
    ----------
    Wen and Chaudhuri, *Batched low-rank adaptation of foundation models*, ICLR 2024, for a batch of different adapters.

    Examples
    --------
    >>> import torch
    >>> from flora_torch import attach
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> for name in ("a", "b"):
    ...     _ = attach(model, ranks=2, adapter_name=name)
    >>> with adapters_for_rows(model, ["a", None, "b"]):
    ...     model(torch.ones(3, 8)).shape
    torch.Size([3, 8])
    """
    layers = layers_of(model, "adapters_for_rows")
    names = {id(place.wrapper): place.name or "the model" for place in places(model) if place.wrapper is not None}
    plan = RowPlan(rows, names, {p.device for p in model.parameters()})
    check_known(model, "adapters_for_rows", list(plan.rows))
    refuse_merged("adapters_for_rows", layers)
    for layer in layers:
        _check_layer(layer, plan, names)
    for place, local, note in whole_of(model):
        if note.active or note.adapter_name in plan.rows:
            raise ValueError(
                f"adapters_for_rows: adapter {note.adapter_name!r} replaces {local!r} of {place.name!r} whole, which "
                "has one value for all rows; detach it, or run its rows in a batch of their own"
            )
    for layer in layers:
        layer.row_plan = plan
    try:
        yield model
    finally:
        for layer in layers:
            layer.row_plan = None


def _check_layer(layer: FloraLayer, plan: RowPlan, names: dict[int, str]) -> None:
    if layer.row_plan is not None:
        raise ValueError("adapters_for_rows: the rows have adapters already; leave the other with block first")
    if layer.takes_rows():
        return
    for adapter in (*plan.rows, *layer.active_adapters):
        if layer.updates(adapter):
            raise ValueError(
                f"adapters_for_rows: adapter {adapter!r} changes {names.get(id(layer), 'a layer')!r}, a "
                f"{type(layer.base_layer).__name__} whose product with the weight is not known row by row; leave it "
                "out of target_modules and target_parameters"
            )
