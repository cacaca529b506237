"""What PEFT writes into an adapter's file beside the adapter: tensors of the base, and some of the adapter twice."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankwise.lora import format
from rankwise.lora.trained import TokenRows
from rankwise.lora.wrapper import Wrapper

_DELTA = ".token_adapter.trainable_tokens_delta"


def is_repeated(
    name: str,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    places: Mapping[str, nn.Module],
    adapter: str,
) -> bool:
    """Whether a tensor of the file is another one again: with bias="all" the bias of a module that is trained in full,
    and the trained rows of an embedding under the name of an output head on its table.

    `places`: what stands in the model, by the name of the place.
    """
    twin = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
    head = places.get(name.removesuffix(_DELTA))
    if name.endswith(_DELTA) and isinstance(head, TokenRows):
        rows = head.rows(adapter).values
        twin = next(key for key, slot in expected.items() if slot is rows)
    return twin in expected and twin in tensors and torch.equal(tensors[twin], tensors[name])


def is_of_base(name: str, tensors: Mapping[str, Tensor], places: Mapping[str, nn.Module], adapter: str) -> bool:
    """Whether a tensor of the file is one of the base (an adapted embedding's table, a head's bias), and this model's.

    Of a table with trained rows the others count.
    """
    plain = name.replace(".original_module.", ".").replace(".token_adapter.base_layer.", ".")
    module, _, parameter = format.module_of(plain, format.adapted_places(tensors)).rpartition(".")
    found = places.get(module)
    own, stored = getattr(found.base if isinstance(found, Wrapper) else found, parameter, None), tensors[name]
    if not isinstance(own, Tensor) or own.shape != stored.shape:
        return False
    own = own.detach().cpu()
    if isinstance(found, TokenRows) and adapter in found.adapters():
        others = (found.rows(adapter).place < 0).cpu()
        own, stored = own[others], stored[others]
    return torch.equal(own.to(stored.dtype), stored) or torch.equal(own, stored.to(own.dtype))
