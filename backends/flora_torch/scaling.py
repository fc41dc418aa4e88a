"""Scales from an α, resolved to the number s when an adapter is made.

A Tucker update has a rank for each mode, and two facts say which number takes the place of r in the rank-stabilized
scale α/√r. Let U_n be orthonormal and the core start at zero.

* A step of size η with every entry of the core moving by ±η (Adam, sign descent) gives ‖ΔW‖ = s·‖G‖ = s·η·√∏ r_n.
* A step of gradient descent lowers the loss by η·s²·‖∇W ×_n U_nᵀ‖², on average over random subspaces
  η·s²·‖∇W‖²·∏ (r_n/I_n).

Both are independent of the ranks with s = α/√∏ r_n, the product taken over the modes that have a factor (a mode left
whole has none, and its size is no choice). LoRA is the update with one factored mode, where this is α/√r.
"""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

__all__ = ["Scaling", "resolve_scale"]

Scaling: TypeAlias = Literal["init", "rank", "rank_stabilized"]

# Factors of variance 1/r (see `flora_torch.initialize.PRESETS`) have the rank divided out already.
_STABLE_ALREADY = ("official", "peft")


def resolve_scale(rule: str, alpha: float, ranks: Sequence[int], *, init: str = "orthonormal") -> float:
    """Return the scale s that a rule makes of α and the ranks.

    Parameters
    ----------
    rule : {"rank", "rank_stabilized"}
        s = α / max r_n, as in LoRA, or s = α / √∏ r_n.
    alpha : float
        α.
    ranks : sequence of int
        The ranks of the modes that have a factor; for an update without any, s = α.
    init : str
        How the factors start: those of ``"official"`` and ``"peft"`` shrink with the rank, which is not done twice.

    Returns
    -------
    float
        s.

    Raises
    ------
    ValueError
        If there is no such rule, α is not finite, or the start divides the rank out already.

    References
    ----------
    Kalajdzievski, *A rank stabilization scaling factor for fine-tuning with LoRA*, arXiv 2312.03732; Hu et al., *LoRA*,
    ICLR 2022, section 4.1, for α/r.

    Examples
    --------
    >>> resolve_scale("rank", 16.0, (8, 4)), resolve_scale("rank_stabilized", 16.0, (16, 4))
    (2.0, 2.0)
    """
    if not math.isfinite(alpha):
        raise ValueError(f"scaling: alpha is {alpha}; pass a finite number")
    if rule == "rank":
        return alpha / max(ranks, default=1)
    if rule == "rank_stabilized":
        if init in _STABLE_ALREADY:
            raise ValueError(
                f"scaling: init {init!r} draws factors of variance proportional to 1/r, so that a plain scale is "
                "rank-stabilized already; pass scale, or another init"
            )
        return alpha / math.sqrt(math.prod(ranks))
    raise ValueError(f"scaling: there is no rule {rule!r}; pass 'init', 'rank' or 'rank_stabilized'")
