"""transformers' Trainer (and TRL's SFTTrainer) train an injected model as it is; this keeps their checkpoints small."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from rankwise.lora.checkpoint import save_adapter
from rankwise.lora.inject import DEFAULT_ADAPTER
from rankwise.lora.update import Update, whole

# Not those of accelerate's FSDP (pytorch_model_fsdp…), which it loads whatever else is there.
_WHOLE_MODEL = ("model*.safetensors*", "pytorch_model.bin*", "pytorch_model-*.bin")


class AdapterCheckpoints(TrainerCallback):
    """Let every checkpoint of a Trainer hold the adapter, in PEFT's folder format, instead of the whole model.

    `Trainer(…, callbacks=[AdapterCheckpoints()])`. For the Trainer there is also model.safetensors, with what trains
    alone. From that `trainer.train(resume_from_checkpoint=…)` goes on, in a model with the adapter put in as for the
    first run, and `load_best_model_at_end=True` takes the best one; both warn that the base's weights are not there.
    """

    def __init__(self, adapter: str = DEFAULT_ADAPTER) -> None:
        self.adapter = adapter

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the adapter; of the model that the Trainer wrote leave what trains."""
        folder, model = Path(args.output_dir, f"checkpoint-{state.global_step}"), kwargs["model"]
        with TemporaryDirectory() as elsewhere:
            # A model that is spread over processes is gathered by all of them.
            save_adapter(model, folder if state.is_world_process_zero else elsewhere, self.adapter)
            trained = {name: whole(tensor).detach().cpu().contiguous() for name, tensor in _trained(model).items()}
        if state.is_world_process_zero:
            for pattern in _WHOLE_MODEL:
                for file in folder.glob(pattern):
                    file.unlink()
            save_file(trained, folder / "model.safetensors", metadata={"format": "pt"})


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """What trains, and the starts that are subtracted from it, by their names in the model."""
    updates = [(name, module) for name, module in model.named_modules() if isinstance(module, Update)]
    starts = {f"{name}.{key}": start for name, update in updates for key, start in update.named_buffers()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | starts
