"""The config of a FLoRA adapter in PEFT: what the user asks for, and what a file says of each weight."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils.other import get_pattern_key

from flora_tensor._adapter_config import WeightTables, check_format
from flora_tensor._checks import check_choice
from flora_torch.attachment import UpdateOptions
from flora_torch.chain import MEMORIES
from flora_torch.initialize import DECOMPOSING, INITS
from flora_torch.peft.registration import peft_type
from flora_torch.update import DROPOUTS

__all__ = ["FloraConfig"]


@dataclass
class FloraConfig(PeftConfig):
    """What a FLoRA adapter of PEFT is made of; every name is PEFT's own where it has one.

    A pattern in a table (``rank_pattern``, …) is a regular expression for the end of a module's name, or of a weight's,
    as in PEFT's other methods; the first that matches counts.

    Parameters
    ----------
    ranks : int, float, or list of (int, float or None)
        One rank for all modes, a fraction of each mode's size, or one a mode of the weight (``None``: left whole);
        lowered to what is feasible.
    target_modules : list of str or str, optional
        Names (or their ends), one regular expression, or ``"all-linear"``. By default, as for PEFT's LoRA, what is
        usual for the type of a transformers model.
    exclude_modules : list of str or str, optional
        Names or a regular expression of what is left out.
    target_parameters : list of str, optional
        Parameters by the ends of their names, such as ``"experts.gate_up_proj"``; any with two axes or more.
    layers_to_transform : list of int or int, optional
        Only the layers of these numbers.
    layers_pattern : list of str or str, optional
        What the list of layers is called, if it is not found by itself.
    rank_pattern : dict
        Ranks that differ, by patterns.
    scale : float
        s.
    scale_pattern : dict
        Scales that differ, by patterns.
    alpha : float, optional
        α, from which s follows by ``scaling``; in the place of ``scale``.
    alpha_pattern : dict
        The α that differ, by patterns.
    scaling : {"rank", "rank_stabilized", "init"}
        What s is made of α: by default α over the largest rank, as in LoRA; see `flora_torch.attach`.
    arrangement : str, optional
        Which axes form a mode, as an einops pattern for weights with as many axes; by default each its own.
    arrangement_pattern : dict
        Arrangements that differ, by patterns.
    init_weights : bool or str
        ``True`` is ``"orthonormal"``; ``False`` starts at random, away from zero, for tests; or the name of a start
        that needs no data: ``"official"``, ``"loralib"``, ``"peft"``, ``"principal"``, ``"minor"``.
    dropout, rank_dropout, module_dropout : float
        See `flora_torch.attach`.
    magnitude : bool
        Whether each output channel also gets a trained magnitude (as DoRA).
    bias : {"none", "all", "flora_only"}
        Which biases are trained too.
    modules_to_save : list of str, optional
        Modules that are trained and saved whole.
    memory : {"normal", "low"}
        What layers keep for the backward pass; see `flora_torch.attach`.

    Attributes
    ----------
    weight_shapes, magnitude_pattern, start_pattern, dropout_pattern, rank_dropout_pattern, module_dropout_pattern
        What a file says of its weights, by their names; see `flora_tensor.adapter_file`. Written when the adapter is
        saved, and not to be set.
    adapter_dtypes, layer_pattern, base_samples, stacks, whole, resized, base_fingerprint
        The same.
    format_version, flora_tensor_version
        The same.
    tables : WeightTables
        What was read of them; empty for a config of no file.
    file_weights : dict of str to str
        The weights that the file changes, each with its name in the tables: its own, or that of a stack.

    Raises
    ------
    ValueError
        If an option is not one of those listed, or options contradict each other.

    References
    ----------
    FLoRA, arXiv 2405.14739.

    Examples
    --------
    >>> FloraConfig(ranks=4, target_modules="all-linear").peft_type.value
    'FLORA'
    """

    ranks: Any = 8
    target_modules: Any = None
    exclude_modules: Any = None
    target_parameters: list[str] | None = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    scale_pattern: dict[str, float] = field(default_factory=dict)
    alpha: float | None = None
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    scaling: str = "rank"
    arrangement: str | None = None
    arrangement_pattern: dict[str, Any] = field(default_factory=dict)
    init_weights: bool | str = True
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    magnitude: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    memory: str = "normal"
    weight_shapes: dict[str, Any] = field(default_factory=dict)
    magnitude_pattern: dict[str, Any] = field(default_factory=dict)
    start_pattern: dict[str, Any] = field(default_factory=dict)
    dropout_pattern: dict[str, Any] = field(default_factory=dict)
    rank_dropout_pattern: dict[str, Any] = field(default_factory=dict)
    module_dropout_pattern: dict[str, Any] = field(default_factory=dict)
    adapter_dtypes: dict[str, Any] = field(default_factory=dict)
    layer_pattern: dict[str, Any] = field(default_factory=dict)
    base_samples: dict[str, Any] = field(default_factory=dict)
    stacks: dict[str, Any] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    resized: dict[str, Any] = field(default_factory=dict)
    base_fingerprint: str | None = None
    format_version: str | None = None
    flora_tensor_version: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        self.described: dict[str, Any] = {}
        if isinstance(self.ranks, tuple):
            self.ranks = list(self.ranks)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            # As PEFT's other methods keep them.
            setattr(self, name, set(value) if isinstance(value, list) else value)
        self._check_choices()
        self._check_selection()
        self.tables = self._read_tables()
        self.file_weights = {m: name for name in self.tables.ranks for m in self.tables.stacks.get(name, [name])}

    def _read_tables(self) -> WeightTables:
        """Read what a file says of each weight; nothing, where the config is of no file."""
        if self.format_version is None:
            return WeightTables.of({}, "FloraConfig")
        noted = dataclasses.asdict(self)
        check_format(noted, "FloraConfig")
        tables = WeightTables.of(noted, "FloraConfig")
        if not tables.ranks:
            raise ValueError(
                "FloraConfig: the file has no ranks in rank_pattern, which PEFT needs before the tensors; read it with "
                "flora_tensor.load_adapter and save it again, or load it with flora_torch.load_adapter"
            )
        # Names of weights are no patterns, and PEFT would warn that they match no module.
        self.rank_pattern = {}
        return tables

    def _check_choices(self) -> None:
        choices = {
            "bias": ("none", "all", "flora_only"),
            "memory": MEMORIES,
            "scaling": ("rank", "rank_stabilized", "init"),
        }
        for name, known in choices.items():
            check_choice("FloraConfig", name, getattr(self, name), known)
        if isinstance(self.init_weights, str) and self.init_weights in DECOMPOSING:
            raise ValueError(
                f"FloraConfig: init_weights={self.init_weights!r} starts from data, which a config cannot hold; attach "
                "with flora_torch.attach(init=…), save that, and load it with PeftModel.from_pretrained"
            )
        known = [name for name in INITS if name not in DECOMPOSING]
        if not isinstance(self.init_weights, bool) and self.init_weights not in known:
            raise ValueError(
                f"FloraConfig: init_weights is {self.init_weights!r}; pass True, False, or one of {', '.join(known)}"
            )
        if self.alpha is None and self.alpha_pattern:
            raise ValueError("FloraConfig: alpha_pattern without alpha; pass alpha too, for the other weights")
        if self.alpha is not None and (self.scale != 1.0 or self.scale_pattern) and self.format_version is None:
            raise ValueError("FloraConfig: got both scale and alpha; pass one of them")

    def _check_selection(self) -> None:
        by_pattern = isinstance(self.target_modules, str)
        for name in ("layers_to_transform", "layers_pattern"):
            if by_pattern and getattr(self, name) is not None:
                raise ValueError(
                    f"FloraConfig: {name} with target_modules {self.target_modules!r}; pass a list of names, or say in "
                    "a regular expression which layers are meant"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("FloraConfig: layers_pattern without layers_to_transform; pass the numbers of the layers")

    @property
    def is_from_file(self) -> bool:
        """Whether the config says what each weight's update is, as one that was read from an adapter does."""
        return self.format_version is not None

    # What PEFT's hotswapping makes a LoRA's scale of; where it asks, the scales of both adapters are known to be equal.
    r, lora_alpha, use_rslora = 1, 1.0, False

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a dictionary; of a saved or loaded adapter, with what its file says of each weight."""
        result: dict[str, Any] = dataclasses.asdict(self)
        if self.is_from_file:
            result["rank_pattern"] = {name: list(ranks) for name, ranks in self.tables.ranks.items()}
        return result | self.described

    def of_no_file(self) -> "FloraConfig":
        """Return what the user asked for, without what a file says of each weight."""
        if not self.is_from_file:
            return dataclasses.replace(self)
        fresh = {f.name: f.default_factory() for f in dataclasses.fields(self) if callable(f.default_factory)}
        return dataclasses.replace(self, **fresh, base_fingerprint=None, format_version=None, flora_tensor_version=None)

    def options_for(self, name: str) -> UpdateOptions:
        """Return what is asked for a weight that no file describes.

        Parameters
        ----------
        name : str
            The weight's name.

        Returns
        -------
        UpdateOptions
            What makes its update.
        """
        alpha = self._pattern(self.alpha_pattern, name, self.alpha)
        scale = 1.0 if alpha is not None else self._pattern(self.scale_pattern, name, self.scale)
        init = self.init_weights if isinstance(self.init_weights, str) else "orthonormal"
        return UpdateOptions(
            self._pattern(self.rank_pattern, name, self.ranks),
            scale=scale,
            alpha=alpha,
            scaling="init" if alpha is None else self.scaling,  # type: ignore[arg-type]
            init=init,
            arrangement=self._arrangement_of(name),
            chances={key: getattr(self, key) for key in DROPOUTS},
            magnitude=self.magnitude,
            where="FloraConfig",
        )

    def _arrangement_of(self, name: str) -> Any:
        own = self._pattern(self.arrangement_pattern, name, None)
        return self.arrangement if own is None else {name: own}

    @staticmethod
    def _pattern(table: dict[str, Any], name: str, default: Any) -> Any:
        """Look a weight up in a table by the end of its module's name, or of its own."""
        for key in (name.rpartition(".")[0], name):
            found = get_pattern_key(list(table), key)
            if found in table:
                return table[found]
        return default
