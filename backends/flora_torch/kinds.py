"""Which kind of layer adapts which weight, and which weights a module of a known kind has.

What works for what (a test tries all of it):

=========================================  =============  =============  =========  =====  ======  ==========
weight                                     ΔW not formed  input dropout  magnitude  merge  merge_  save, load
=========================================  =============  =============  =========  =====  ======  ==========
nn.Linear, Conv1D of transformers          yes            yes            yes        yes    yes     yes
nn.Conv1d, 2d, 3d                          yes            yes            yes        yes    yes     yes
nn.ConvTranspose1d, 2d, 3d                 yes            yes            yes        yes    yes     yes
nn.Embedding                               yes            yes            yes        yes    yes     yes
nn.EmbeddingBag: sum, mean                 yes            no             no         yes    yes     yes
nn.EmbeddingBag: max                       no             no             no         yes    yes     yes
nn.Bilinear                                yes            yes            no         yes    yes     yes
nn.LSTM, GRU, RNN and cells                no             no             no         yes    yes     yes
nn.MultiheadAttention: in-projections      no             no             no         yes    yes     yes
nn.MultiheadAttention: out_proj            no             no             yes        yes    yes     yes
experts in one parameter                   yes            no             no         yes    yes     yes
nn.ParameterList, ParameterDict            no             no             no         yes    yes     yes
any other parameter with two axes or more  no             no             no         yes    yes     yes
a layer with a forward of its own          no             no             yes        yes    yes     yes
weight_norm                                yes            yes            yes        yes    no      yes
spectral_norm and others                   yes            yes            yes        yes    no      yes
quantized, with a way back                 yes            yes            yes        yes    no      yes
quantized, without one                     yes            yes            no         no     no      yes
=========================================  =============  =============  =========  =====  ======  ==========

Training, switching off and taking off work for all of them. Where ΔW is formed, it is formed once in each call, or
twice by attention that is evaluated with gradients. In place (`merge_`) only a weight can be merged that the module
keeps as it is used.
"""

from torch import nn

from flora_torch.base_weight import check_adaptable, is_packed_for_inference
from flora_torch.bilinear import FloraBilinear, FloraEmbeddingBag
from flora_torch.containers import FloraParameterCollection
from flora_torch.experts import FloraExperts, expert_weights
from flora_torch.flora_layer import FloraLayer
from flora_torch.layers import FloraConv, FloraConvTranspose, FloraEmbedding, FloraLinear, FloraParameter
from flora_torch.weight_layer import WeightLayer, is_read_by_its_parent

__all__ = ["drops_input", "layer_weights", "refusal", "wrapper_for"]

_KINDS = (FloraLinear, FloraConv, FloraConvTranspose, FloraEmbedding, FloraBilinear, FloraEmbeddingBag)


def wrapper_for(module: nn.Module, parameter: str = "weight") -> type[FloraLayer]:
    """Return the kind of layer that adapts a parameter of a module best: the one that knows its product, if any.

    Parameters
    ----------
    module : nn.Module
        The module that owns the parameter.
    parameter : str
        The parameter's name.

    Returns
    -------
    type
        `FloraLinear`, `FloraConv`, `FloraConvTranspose`, `FloraEmbedding`, `FloraBilinear` or `FloraEmbeddingBag` for
        the ``weight`` of such a layer, `FloraExperts` for one parameter of all experts,
        `FloraParameterCollection` for an entry of a list or dictionary, else `FloraParameter`.

    Examples
    --------
    >>> wrapper_for(nn.Conv1d(2, 2, 3)).__name__, wrapper_for(nn.GRUCell(2, 2), "weight_ih").__name__
    ('FloraConv', 'FloraParameter')
    """
    if parameter == "weight":
        for kind in _KINDS:
            if kind.accepts(module):
                return kind
    if isinstance(module, nn.ParameterList | nn.ParameterDict):
        return FloraParameterCollection
    return FloraExperts if parameter in expert_weights(module) else FloraParameter


def drops_input(module: nn.Module, parameter: str = "weight") -> bool:
    """Tell whether an update of this parameter can have dropout: it needs an input, and a product that is known.

    Examples
    --------
    >>> drops_input(nn.Linear(2, 2)), drops_input(nn.GRUCell(2, 2), "weight_ih")
    (True, False)
    """
    kind = wrapper_for(module, parameter)
    if not issubclass(kind, WeightLayer) or issubclass(kind, FloraEmbeddingBag):
        return False
    return kind.knows_forward_of(module) and not is_read_by_its_parent(module)


def layer_weights(module: nn.Module) -> tuple[str, ...]:
    """List the weights that make a module a layer of a known kind; empty for any other module.

    Attention has the weight of its output projection among them, which a child of it owns.

    Examples
    --------
    >>> layer_weights(nn.GRUCell(3, 4)), layer_weights(nn.LayerNorm(3))
    (('weight_ih', 'weight_hh'), ())
    >>> layer_weights(nn.MultiheadAttention(4, 2))
    ('in_proj_weight', 'out_proj.weight')
    """
    if issubclass(wrapper_for(module), WeightLayer) or is_packed_for_inference(module):
        return ("weight",)
    own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return tuple(name for name in own if name.startswith("weight_"))
    if isinstance(module, nn.MultiheadAttention):
        return (*(name for name in own if name.endswith("proj_weight")), "out_proj.weight")
    return expert_weights(module)


def refusal(module: nn.Module, parameter: str) -> str | None:
    """Tell why a weight cannot be adapted; ``None`` where it can.

    Examples
    --------
    >>> refusal(nn.Embedding(3, 2, max_norm=1.0), "weight")
    'FloraEmbedding: the base has max_norm=1.0, which rewrites its weight at every use; set max_norm to None first'
    """
    try:
        check_adaptable("", module, parameter)
        kind = wrapper_for(module, parameter)
        if issubclass(kind, WeightLayer):
            kind.check_base(module)
    except ValueError as error:
        return str(error).removeprefix(": ")
    return None
