"""Weights of 8 bits that mean something only times the scales beside them, as quantized checkpoints hold them.

They are told by the customary names of the scales, since no file says what it is: those of DeepSeek, of
compressed-tensors and ModelOpt, of ComfyUI, and of bitsandbytes.
"""

from flora_tensor.checkpoint import Checkpoint

__all__ = ["scale_of", "weight_of"]

_TYPES = ("F8_", "I8", "U8")
_AFTER_ANY_NAME = ("_scale", "_scale_inv", "_scale_2")
_BESIDE_WEIGHT = ("scale", "scale_weight", "scale_input", "input_scale", "SCB")


def scale_of(checkpoint: Checkpoint, name: str) -> str | None:
    """Return the tensor that a weight must be multiplied by, or ``None`` where its numbers are what they are."""
    if not checkpoint.info(name).dtype.startswith(_TYPES):
        return None
    module, _, last = name.rpartition(".")
    beside = [f"{name}{suffix}" for suffix in _AFTER_ANY_NAME]
    beside += [f"{module}.{scale}" for scale in _BESIDE_WEIGHT if last == "weight"]
    return next((scale for scale in beside if scale in checkpoint), None)


def weight_of(checkpoint: Checkpoint, name: str) -> str | None:
    """Return the weight that a tensor is but a scale of, or ``None`` where it is a tensor in its own right."""
    module, _, last = name.rpartition(".")
    owners = [name.removesuffix(suffix) for suffix in _AFTER_ANY_NAME if name.endswith(suffix)]
    owners += [f"{module}.weight"] if last in _BESIDE_WEIGHT else []
    return next((w for w in owners if w in checkpoint and checkpoint.info(w).dtype.startswith(_TYPES)), None)
