"""FLoRA as a method of Hugging Face PEFT: importing this module registers it, and PEFT's own functions do the rest.

The layers are those of `flora_torch`, and so are the files: what `flora_torch.save_adapter` or an extraction wrote
loads with ``PeftModel.from_pretrained``, and what PEFT saves loads with `flora_torch.load_adapter` and works with the
commands of `flora-tensor`.

>>> import peft, torch
>>> from flora_torch.peft import FloraConfig
>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.LazyLinear(4))
>>> _ = model(torch.ones(1, 3, 5, 5))
>>> model = peft.get_peft_model(model, FloraConfig(ranks=2, target_modules=["0", "2"]))
>>> model.print_trainable_parameters()
trainable params: 206 || all params: 722 || trainable%: 28.5319

Models of diffusers take such a config too: ``add_adapter``, ``set_adapters`` with weights, ``fuse_lora`` and the rest.
Their ``save_lora_adapter`` and ``load_lora_adapter`` are for LoRA alone: save with
``flora_torch.save_adapter(model, path, adapter_name=…)``, and load with ``flora_torch.load_adapter(model, path)``.

PEFT knows files of type FLORA only after this import; before it, loading one ends in its ``KeyError: 'FLORA'``.
"""

import importlib

try:
    importlib.import_module("peft")
except ModuleNotFoundError as error:
    if error.name != "peft":
        raise
    raise ImportError("flora_torch.peft needs Hugging Face PEFT; run pip install 'flora-tensor[peft]'") from error

from flora_torch.peft.config import FloraConfig
from flora_torch.peft.model import FloraModel
from flora_torch.peft.registration import register

__all__ = ["FloraConfig", "FloraModel"]

register(FloraConfig, FloraModel)
