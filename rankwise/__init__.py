"""LoRA fine-tuning on the machine at hand.

Inside your own model and loop:

    import rankwise
    from rankwise import LoraConfig, TaskType

    report = rankwise.inject_(model, LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=32))
    print(report)                                     # each adapted matrix, d·k → r·(d+k)
    optimizer = torch.optim.AdamW(rankwise.trainable_parameters(model), lr=1e-3)
    ...                                               # train as ever
    rankwise.save_adapter(model, "my-adapter")        # the folder format of PEFT

Later, on the same base model:

    rankwise.load_adapter_(model, "my-adapter")
    with rankwise.adapters_off(model): ...            # the base model
    rankwise.merge_(model)                            # no extra work at inference; unmerge_ goes back
    rankwise.eject_(model)                            # the very base model, bit for bit

A name with a trailing underscore changes the model in place.
The names are imported when they are first used, so that `import rankwise` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.lora.adapters import activate_ as activate_
    from rankwise.lora.adapters import adapter_names as adapter_names
    from rankwise.lora.adapters import adapters_by_row as adapters_by_row
    from rankwise.lora.adapters import delete_adapter_ as delete_adapter_
    from rankwise.lora.adapters import reset_adapter_ as reset_adapter_
    from rankwise.lora.checkpoint import Adapter as Adapter
    from rankwise.lora.checkpoint import load_adapter_ as load_adapter_
    from rankwise.lora.checkpoint import read_adapter as read_adapter
    from rankwise.lora.checkpoint import save_adapter as save_adapter
    from rankwise.lora.checkpoint import swap_adapter_ as swap_adapter_
    from rankwise.lora.combine import CombineReport as CombineReport
    from rankwise.lora.combine import combine_adapters_ as combine_adapters_
    from rankwise.lora.config import LoraConfig as LoraConfig
    from rankwise.lora.config import TaskType as TaskType
    from rankwise.lora.inject import adapters_off as adapters_off
    from rankwise.lora.inject import eject_ as eject_
    from rankwise.lora.inject import inject_ as inject_
    from rankwise.lora.inject import trainable_parameters as trainable_parameters
    from rankwise.lora.kinds import register_layer as register_layer
    from rankwise.lora.low_rank import LowRank as LowRank
    from rankwise.lora.merge import MergeReport as MergeReport
    from rankwise.lora.merge import merge_ as merge_
    from rankwise.lora.merge import merge_and_remove_ as merge_and_remove_
    from rankwise.lora.merge import unmerge_ as unmerge_
    from rankwise.lora.report import InjectReport as InjectReport
    from rankwise.lora.start import start_from_data_ as start_from_data_
    from rankwise.lora.start import start_from_original_ as start_from_original_
    from rankwise.rank.inspect import inspect_adapter as inspect_adapter
    from rankwise.rank.nested import nested as nested
    from rankwise.rank.predict import predict as predict
    from rankwise.rank.shrink import HeldOut as HeldOut
    from rankwise.rank.shrink import shrink_ as shrink_
    from rankwise.rank.sweep import sweep as sweep
    from rankwise.rank.sweep import sweep_setting as sweep_setting
    from rankwise.rank.verdict import verdict as verdict
    from rankwise.train.config import TrainConfig as TrainConfig
    from rankwise.train.optimizer import lora_optimizer as lora_optimizer
    from rankwise.train.together import train_together as train_together

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "rankwise.lora.checkpoint",
    "CombineReport": "rankwise.lora.combine",
    "HeldOut": "rankwise.rank.shrink",
    "InjectReport": "rankwise.lora.report",
    "LoraConfig": "rankwise.lora.config",
    "LowRank": "rankwise.lora.low_rank",
    "MergeReport": "rankwise.lora.merge",
    "TaskType": "rankwise.lora.config",
    "TrainConfig": "rankwise.train.config",
    "activate_": "rankwise.lora.adapters",
    "adapter_names": "rankwise.lora.adapters",
    "adapters_by_row": "rankwise.lora.adapters",
    "adapters_off": "rankwise.lora.inject",
    "combine_adapters_": "rankwise.lora.combine",
    "delete_adapter_": "rankwise.lora.adapters",
    "eject_": "rankwise.lora.inject",
    "inject_": "rankwise.lora.inject",
    "inspect_adapter": "rankwise.rank.inspect",
    "load_adapter_": "rankwise.lora.checkpoint",
    "lora_optimizer": "rankwise.train.optimizer",
    "merge_": "rankwise.lora.merge",
    "merge_and_remove_": "rankwise.lora.merge",
    "nested": "rankwise.rank.nested",
    "predict": "rankwise.rank.predict",
    "read_adapter": "rankwise.lora.checkpoint",
    "register_layer": "rankwise.lora.kinds",
    "reset_adapter_": "rankwise.lora.adapters",
    "save_adapter": "rankwise.lora.checkpoint",
    "shrink_": "rankwise.rank.shrink",
    "start_from_data_": "rankwise.lora.start",
    "start_from_original_": "rankwise.lora.start",
    "swap_adapter_": "rankwise.lora.checkpoint",
    "sweep": "rankwise.rank.sweep",
    "sweep_setting": "rankwise.rank.sweep",
    "train_together": "rankwise.train.together",
    "trainable_parameters": "rankwise.lora.inject",
    "unmerge_": "rankwise.lora.merge",
    "verdict": "rankwise.rank.verdict",
}
__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
    module = import_module(_HOMES[name])
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return __all__
