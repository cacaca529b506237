"""transformers' Trainer (and TRL's SFTTrainer) train an injected model as it is; this keeps their checkpoints small."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rankwise.lora.checkpoint import save_adapter
from rankwise.lora.inject import DEFAULT

_WHOLE_MODEL = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*")


class AdapterCheckpoints(TrainerCallback):
    """Let every checkpoint of a Trainer hold the adapter, in PEFT's folder format, instead of the whole model.

    `Trainer(…, callbacks=[AdapterCheckpoints()])`. To go on from a checkpoint, load its adapter with
    `load_adapter_(model, checkpoint, trainable=True)` into the base model before the Trainer is made.
    """

    def __init__(self, adapter: str = DEFAULT) -> None:
        self.adapter = adapter

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the adapter; take away the model that the Trainer wrote."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        save_adapter(kwargs["model"], folder, self.adapter)
        for pattern in _WHOLE_MODEL:
            for file in folder.glob(pattern):
                file.unlink()
