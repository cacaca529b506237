"""Who shares a weight with whom (an embedding and the output head, as a rule)."""

from torch import Tensor, nn


def sharing_names(model: nn.Module, weight: Tensor) -> list[str]:
    """The names of all parameters of `model` that lie in the same storage as `weight`, itself included."""
    return [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    ]
