"""Which layers a model computes with by reading their weight, without calling them.

Mamba multiplies with `self.dt_proj.weight`, MobileBERT concatenates two weights, nn.TransformerEncoderLayer hands all
of its weights to one kernel in inference. An adapter that acts in a layer's forward alone would be ignored there in
silence. The code of the modules above a layer says so: as self.up.weight, or by a name that an assignment or a loop
gives to self.up or to the elements of self.layers. A layer that is handed to a function which reads its weight is not
found, and one that a loop tells by its class is no more of that class; leave such out (exclude_modules).
"""

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from types import CodeType, FunctionType

from torch import nn

from rankwise.lora.wrapper import READ, Wrapper

EACH = "*"
"""Stands in a path for every child."""
BELOW = "**"
"""Stands in a path for every module below."""
Path = tuple[str, ...]
"""The names that lead from a module to one below."""
_ABOUT_IT_ONLY = ("dtype", "device", "shape", "size", "ndim", "is_meta", "requires_grad")


def modules_read(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Those with whose weight or bias one of these computes; a module may stand in several places below them."""
    parents = [module for module in modules if module._modules]
    return {found for parent in parents for path in _paths_read(type(parent)) for found in _at(path, parent)}


def _at(path: Path, parent: nn.Module) -> list[nn.Module]:
    found = [parent]
    for name in path:
        below = [child for module in found for child in _below(module, name)]
        found = [child.base if isinstance(child, Wrapper) else child for child in below]
    return found


def _below(module: nn.Module, name: str) -> Iterable[nn.Module]:
    if name == BELOW:
        return module.modules()
    if name == EACH:
        return module.children()
    child = module._modules.get(name)
    return () if child is None else (child,)


@cache
def _paths_read(kind: type[nn.Module]) -> frozenset[Path]:
    """The paths below a module of this type to layers whose weight or bias its methods use as a value."""
    own = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    methods = [method for base in own for name, method in vars(base).items() if not _prepares(name)]
    return frozenset(path for method in methods for path in _paths_in(method) if path)


@cache
def members_reading(kind: type[nn.Module]) -> frozenset[str]:
    """The public methods and properties that a layer's class adds to torch's, and that compute with its own weight or
    bias, by themselves or by others that they use."""
    added = [base for base in kind.__mro__ if base is not object and not base.__module__.startswith("torch.")]
    members = [(name, member) for base in added for name, member in vars(base).items()]
    own = [(name, member) for name, member in members if not (hasattr(nn.Module, name) or _prepares(name))]
    found = {name for name, member in own if () in _paths_in(member)}
    while more := {name for name, member in own if _uses(member, {"forward", *found})} - found:
        found |= more
    return frozenset(name for name in found if not name.startswith("_"))


def _uses(member: object, names: set[str]) -> bool:
    function = _function_of(member)
    return isinstance(function, FunctionType) and not names.isdisjoint(_names(function.__code__))


def _prepares(name: str) -> bool:
    """Whether a method of this name builds or fills the module, and computes nothing with it."""
    return not {"init", "initialize", "initialise", "reset", "tie", "resize", "load"}.isdisjoint(name.split("_"))


def _function_of(member: object) -> object:
    """The code behind an attribute of a class."""
    match member:
        case property():
            return member.fget
        case cached_property():
            return member.func
    return inspect.unwrap(member) if callable(member) else None


def _paths_in(method: object) -> Iterator[Path]:
    function = _function_of(method)
    if not isinstance(function, FunctionType) or not any(name in _names(function.__code__) for name in READ):
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # There is no source to read.
        return
    names = _names_given(tree)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr in READ and isinstance(node.ctx, ast.Load)):
            continue
        if not (_asks_about_it(parents[node]) or _changes_it(parents[node], parents)):
            yield from _paths_of(node.value, names)


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _names_given(tree: ast.AST) -> dict[str, set[Path]]:
    """What the names in a method may stand for below self; where a name is given to several, to all of them."""
    names: dict[str, set[Path]] = {"self": {()}}
    for _ in range(3):  # A name may be given to what another one stands for.
        for node in ast.walk(tree):
            if isinstance(node, ast.For | ast.comprehension):
                targets, paths = [node.target], _elements_of(node.iter, names)
            elif isinstance(node, ast.Assign):
                targets, paths = node.targets, _paths_of(node.value, names)
            elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
                targets, paths = [node.target], _paths_of(node.value, names)
            else:
                continue
            given = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            for name in given:
                names[name] = names.get(name, set()) | paths
    return names


def _paths_of(node: ast.AST, names: dict[str, set[Path]]) -> set[Path]:
    """What an expression may stand for below self: {("attention", "q_proj")} for self.attention.q_proj."""
    match node:
        case ast.Name(id=name):
            return names.get(name, set())
        case ast.Attribute(value=owner, attr=name):
            return {(*path, name) for path in _paths_of(owner, names)}
        case ast.Subscript(value=owner, slice=ast.Slice()):
            return _paths_of(owner, names)
        case ast.Subscript(value=owner, slice=key) | ast.Call(func=ast.Name(id="getattr"), args=[owner, key, *_]):
            name = str(key.value) if isinstance(key, ast.Constant) else EACH
            return {(*path, name) for path in _paths_of(owner, names)}
        case ast.NamedExpr(value=value):
            return _paths_of(value, names)
        case ast.IfExp(body=one, orelse=other):
            return _paths_of(one, names) | _paths_of(other, names)
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return {path for part in parts for path in _paths_of(part, names)}
        case ast.Starred(value=several):
            return _elements_of(several, names)
    return set()


def _elements_of(node: ast.AST, names: dict[str, set[Path]]) -> set[Path]:
    """What a loop over an expression goes through below self."""
    match node:
        case ast.Tuple() | ast.List():
            return _paths_of(node, names)
        case ast.Call(func=ast.Name(id="enumerate" | "zip" | "reversed" | "list"), args=parts):
            return {path for part in parts for path in _elements_of(part, names)}
        case ast.Call(func=ast.Attribute(value=owner, attr="values" | "items" | "children" | "named_children")):
            return _elements_of(owner, names)
        case ast.Call(func=ast.Attribute(value=owner, attr="modules" | "named_modules")):
            return {(*path, BELOW) for path in _paths_of(owner, names)}
    return {(*path, EACH) for path in _paths_of(node, names)}


def _asks_about_it(parent: ast.AST) -> bool:
    """Whether what is done with a weight concerns its type or shape, or whether it is there, and not its values."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in _ABOUT_IT_ONLY
    if isinstance(parent, ast.Compare):
        return any(isinstance(operator, ast.Is | ast.IsNot) for operator in parent.ops)
    return isinstance(parent, ast.Call) and getattr(parent.func, "id", "") in ("isinstance", "hasattr", "id")


def _changes_it(parent: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a weight is changed in place, which has to reach the base's own (RWKV scales some in inference)."""
    while isinstance(parents.get(parent), ast.Attribute):
        parent = parents[parent]
    return isinstance(parent, ast.Attribute) and parent.attr.endswith("_")
