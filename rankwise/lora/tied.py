"""Who shares a weight with whom (an embedding and the output head, as a rule)."""

from torch import Tensor, nn


def sharing_names(model: nn.Module, weight: Tensor) -> list[str]:
    """The names of all parameters of `model` that lie in the same storage as `weight`, itself included."""
    return [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    ]


def is_tied_head(module: nn.Module, embedding: nn.Module) -> bool:
    """Whether a linear layer, another module than the embedding, uses the embedding's very table as its weight."""
    return isinstance(module, nn.Linear) and module.weight is embedding.weight
