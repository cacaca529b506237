"""Which layers a model computes with by reading their weight, without calling them.

Mamba multiplies with `self.dt_proj.weight`, MobileBERT concatenates two weights, nn.TransformerEncoderLayer hands all
of its weights to one kernel in inference. An adapter that acts in a layer's forward alone would be ignored there in
silence. The code of the modules above a layer says so.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType

from torch import nn

READ = ("weight", "bias")
_ABOUT_IT_ONLY = ("dtype", "device", "shape", "size", "ndim", "is_meta", "requires_grad")


def weight_is_read(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a module above the one of this name computes with its weight or bias; `modules` are all, by name."""
    parts = name.split(".")
    return any(
        ".".join(parts[depth:]) in _paths_read(type(parent))
        for depth in range(len(parts))
        if (parent := modules.get(".".join(parts[:depth]))) is not None
    )


@cache
def _paths_read(kind: type[nn.Module]) -> frozenset[str]:
    """The layers, as dotted names below a module of this type, whose weight or bias its methods use as a value."""
    own = kind.__mro__[: kind.__mro__.index(nn.Module)] if nn.Module in kind.__mro__ else ()
    methods = [method for base in own for name, method in vars(base).items() if not _prepares(name)]
    return frozenset(path for method in methods for path in _paths_in(method))


def _prepares(name: str) -> bool:
    """Whether a method of this name builds or fills the module, and computes nothing with it."""
    return any(word in name for word in ("init", "reset", "tie", "resize", "load"))


def _paths_in(method: object) -> Iterator[str]:
    function = inspect.unwrap(method) if callable(method) else None
    if not isinstance(function, FunctionType) or not any(name in _names(function.__code__) for name in READ):
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # There is no source to read.
        return
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in READ and isinstance(node.ctx, ast.Load):
            path = _path_below_self(node.value)
            if path and not _asks_about_it(parents[node]):
                yield path


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _path_below_self(node: ast.expr) -> str:
    """ "attention.q_proj" of self.attention.q_proj; "" of anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return ".".join(parts) if isinstance(node, ast.Name) and node.id == "self" else ""


def _asks_about_it(parent: ast.AST) -> bool:
    """Whether what is done with a weight concerns its type or shape, or whether it is there, and not its values."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in _ABOUT_IT_ONLY
    if isinstance(parent, ast.Compare):
        return any(isinstance(operator, ast.Is | ast.IsNot) for operator in parent.ops)
    return isinstance(parent, ast.Call) and getattr(parent.func, "id", "") in ("isinstance", "hasattr", "id")
