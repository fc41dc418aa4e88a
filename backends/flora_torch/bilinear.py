"""Layers with products of further kinds: bilinear forms and bags of embeddings."""

from typing import Any

import torch.nn.functional as nnf
from torch import Tensor, nn
from typing_extensions import override

from flora_torch.chain import autocasts
from flora_torch.cost import n_rows
from flora_torch.update import TuckerUpdate
from flora_torch.weight_layer import WeightLayer

__all__ = ["FloraBilinear", "FloraEmbeddingBag"]


class FloraBilinear(WeightLayer):
    """A bilinear layer with W + Σ s·ΔW, where ΔW = G ×₁ U_0 ×₂ U_1 ×₃ U_2 is what it is by nature: three axes.

    y_o = Σ ΔW_oij a_i b_j is computed as U_0 (G (U_1ᵀ a) (U_2ᵀ b)). Dropout drops entries of both inputs.

    Parameters
    ----------
    base_layer : nn.Bilinear
        The layer to adapt; subclasses too. Its weight is (out, in1, in2).
    ranks, adapter_name, path, **options
        As for `FloraLinear`, with three ranks.
    memory : {"normal", "low"}
        Without effect: what is kept for the backward pass is thin in any case.

    Raises
    ------
    TypeError
        If the base is of another kind.
    ValueError
        As for `FloraLayer.add_adapter`.

    References
    ----------
    FLoRA, arXiv 2405.14739, equation 5.

    Examples
    --------
    >>> import torch
    >>> layer = FloraBilinear(nn.Bilinear(5, 4, 3), ranks=2)
    >>> layer(torch.ones(1, 5), torch.ones(1, 4)).shape
    torch.Size([1, 3])
    """

    _known = (nn.Bilinear,)

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Run the base layer with W + Σ s·ΔW.

        Parameters
        ----------
        input1 : Tensor, shape (..., in1)
            The first input.
        input2 : Tensor, shape (..., in2)
            The second input.

        Returns
        -------
        Tensor, shape (..., out)
            As the base layer gives it, in its type.
        """
        running = self.running()
        added = [update for update in running if not self._forms_delta(update, input1)]
        formed = [update for update in running if all(update is not other for other in added)]
        result = self._run_base(formed, input1, input2)
        for update in added:
            result = (result + self._form(update, input1, input2)).to(result.dtype)
        return result

    def _form(self, update: TuckerUpdate, a: Tensor, b: Tensor) -> Tensor:
        """Compute the bilinear form of s·ΔW."""
        if self._drops(update):
            a, b = nnf.dropout(a, update.dropout), nnf.dropout(b, update.dropout)
        if not self._has_factored(update) or self.path == "dense":
            return nnf.bilinear(a, b, update.delta(drop=self.training).to(a.dtype))
        if not autocasts(a):
            a, b = a.to(update.core.dtype), b.to(update.core.dtype)
        total: Tensor | None = None
        for core, (u, v, w), sign in update.terms(drop=self.training):
            x, y = a if v is None else a @ v, b if w is None else b @ w
            # A matrix product, which autocast knows, where torch's bilinear form is none.
            z = (x @ core.transpose(0, 1).flatten(1)).unflatten(-1, (core.shape[0], core.shape[2]))
            z = (z @ y.unsqueeze(-1)).squeeze(-1)
            z = sign * (z if u is None else z @ u.mT)
            total = z if total is None else total + z
        assert total is not None
        return total

    @override
    def takes_rows(self) -> bool:
        return False

    @override
    def _as_used(self, weight: Tensor) -> Tensor:
        # Autocast leaves torch's bilinear form alone.
        return weight

    @override
    def _forms_delta(self, update: TuckerUpdate, input: Tensor) -> bool:
        if self._drops(update):
            return False
        if self.path != "auto" or not self._has_factored(update):
            return self.path != "factored"
        out, first, second = update.shape
        r0, r1, r2 = update.core.shape
        rows = n_rows(input.shape[:-1])
        thin = r0 * r1 * r2 + first * r1 + second * r2 + out * r0
        # Forming takes one product a mode, the last of them as large as the weight times a rank.
        return rows * thin > out * first * second * min(r0, r1, r2)


class FloraEmbeddingBag(WeightLayer):
    """Sums or means of embeddings with W + Σ s·ΔW, where the rows of ΔW = U_0 G U_1ᵀ are summed in U_0.

    A maximum is not linear in the weight, and always runs dense. ``sparse`` is about the gradient of the base's
    weight, which is frozen, and has no effect.

    Parameters
    ----------
    base_layer : nn.EmbeddingBag
        The layer to adapt; subclasses too.
    ranks, adapter_name, path, **options
        As for `FloraLinear`, without dropout.
    memory : {"normal", "low"}
        Without effect: what is kept for the backward pass is thin in any case.

    Raises
    ------
    TypeError
        If the base is of another kind.
    ValueError
        If the base has ``max_norm``, or dropout is asked for, and as for `FloraLayer.add_adapter`.

    References
    ----------
    FLoRA, arXiv 2405.14739, equation 5.

    Examples
    --------
    >>> import torch
    >>> layer = FloraEmbeddingBag(nn.EmbeddingBag(100, 16), ranks=4)
    >>> layer(torch.tensor([[3, 1], [4, 1]])).shape
    torch.Size([2, 16])
    """

    _known = (nn.EmbeddingBag,)

    @override
    def check_update(self, adapter_name: str, update: TuckerUpdate, *, parameter: str = "weight") -> None:
        if update.dropout:
            raise ValueError(
                f"FloraEmbeddingBag: dropout is {update.dropout}, but what is looked up is summed at once; pass "
                "dropout=0, or rank_dropout"
            )
        super().check_update(adapter_name, update, parameter=parameter)

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Run the base layer with W + Σ s·ΔW.

        Parameters
        ----------
        input : Tensor, shape (bags, length) or (total,)
            The rows that are looked up.
        offsets : Tensor, shape (bags,), optional
            Where the bags begin.
        per_sample_weights : Tensor, of the shape of input, optional
            What each row is multiplied by.

        Returns
        -------
        Tensor, shape (bags, embedding_dim)
            As the base layer gives it.
        """
        updates = self.running()
        if not (self._is_plain and all(self._has_factored(update) for update in updates)) or self.path == "dense":
            return self._whole(updates, input, offsets, per_sample_weights)
        result: Tensor = self.base_layer(input, offsets, per_sample_weights)
        for update in updates:
            total: Tensor | None = None
            for core, (rows, columns), sign in update.terms(drop=self.training):
                y = self._look_up(core if rows is None else rows, input, offsets, per_sample_weights)
                y = y if rows is None else y @ core
                y = sign * (y if columns is None else y @ columns.mT)
                total = y if total is None else total + y
            assert total is not None
            result = (result + total).to(result.dtype)
        return result

    def _whole(self, updates: list[TuckerUpdate], input: Tensor, *args: Tensor | None) -> Tensor:
        if not updates:
            return self.base_layer(input, *args)
        if not self._is_plain:
            return self._run_base(updates, input, *args)
        return self._look_up(self.effective("weight", updates), input, *args)

    def _look_up(self, weight: Tensor, input: Tensor, offsets: Tensor | None, per_sample: Tensor | None) -> Tensor:
        # Dense gradients, whatever the base's `sparse` says: a sparse one cannot flow into a product.
        base: Any = self.base_layer
        return nnf.embedding_bag(
            input,
            weight,
            offsets,
            scale_grad_by_freq=base.scale_grad_by_freq,
            mode=base.mode,
            per_sample_weights=None if per_sample is None else per_sample.to(weight.dtype),
            include_last_offset=base.include_last_offset,
            padding_idx=base.padding_idx,
        )

    @override
    def takes_rows(self) -> bool:
        return False

    @override
    def _has_factored(self, update: TuckerUpdate) -> bool:
        base: Any = self.base_layer
        return super()._has_factored(update) and base.mode != "max" and not base.scale_grad_by_freq
