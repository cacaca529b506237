"""Who shares a weight with whom (an embedding and the output head, as a rule)."""

from collections import Counter

from torch import Tensor, nn


def storage_counts(model: nn.Module) -> Counter[int]:
    """How many parameters of `model`, each of its names counted, lie in each storage (by `storage_of`)."""
    return Counter(storage_of(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))


def storage_of(tensor: Tensor) -> int:
    """What tells one storage from another."""
    return tensor.untyped_storage().data_ptr()
