"""What the source of a module's class says: the weights of modules inside it that it reads itself."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

from torch import nn

from ..nn.attention import PROJECTIONS

_NOT_THE_VALUES = ("dtype", "device", "shape", "data", "requires_grad", "ndim")
_WEIGHTS = ("weight", "in_proj_weight", *(f"{name}_weight" for name in PROJECTIONS))
_DEPTH = 6  # of paths that are followed
_Path = tuple[str, ...]
Read = tuple[_Path, str]
"""Path from the module to the one inside, in which "*" is every child, and the name of its weight."""


@cache
def weights_read_by(cls: type) -> frozenset[Read]:
    """Weights of modules inside that a method of the class computes with, as `self.x.weight` or through names of its own."""
    if cls is nn.Module:
        return frozenset()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    for node in tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else ():
        if isinstance(node, ast.FunctionDef):
            _call_first_argument_self(node)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    functions.pop("_forward_cross_attn", None)  # of timm's MobileViT v2, which gives it no second input
    called = [name for name in functions if "forward" in name]
    for name in called:  # grows: methods that these methods call
        called += [other for other in _own_attributes(functions[name]) if other in functions and other not in called]
    names = _Names({name: functions[name] for name in called})
    return frozenset(read for name in called for read in names.read_in(functions[name], name))


def _call_first_argument_self(method: ast.FunctionDef) -> None:
    arguments = method.args.posonlyargs + method.args.args
    if not arguments or any(isinstance(node, ast.Name) and node.id == "staticmethod" for node in method.decorator_list):
        return
    for node in ast.walk(method):
        if isinstance(node, ast.Name) and node.id == arguments[0].arg:
            node.id = "self"


def _own_attributes(tree: ast.AST) -> list[str]:
    """Every `x` of a `self.x`, once."""
    found: dict[str, None] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                found[name] = None
    return list(found)


class _Names:
    """What the local names of some methods stand for: paths to modules inside of self."""

    def __init__(self, functions: dict[str, ast.FunctionDef]) -> None:
        self.functions = functions
        self.known: dict[str, dict[str, set[_Path]]] = {name: {"self": {()}} for name in functions}
        for _ in range(3):  # names of names, and arguments of methods that call one another
            for name, function in functions.items():
                for node in ast.walk(function):
                    self._bind(name, node)

    def _bind(self, where: str, node: ast.AST) -> None:
        match node:
            case ast.Assign(targets=[target], value=value) | ast.NamedExpr(target=target, value=value):
                self._give(where, target, value)
            case ast.For(target=target, iter=values) | ast.comprehension(target=target, iter=values):
                self._give_each(where, target, values)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name), args=values) if (
                name in self.functions
            ):
                arguments = self.functions[name].args.args[1:]
                for argument, value in zip(arguments, values, strict=False):
                    self._add(name, argument.arg, self.paths(where, value))

    def _add(self, where: str, name: str, paths: set[_Path]) -> None:
        if paths and name != "self":
            self.known[where].setdefault(name, set()).update(paths)

    def _give(self, where: str, target: ast.expr, value: ast.expr) -> None:
        match target, value:
            case ast.Name(id=name), _:
                self._add(where, name, self.paths(where, value))
            case ast.Tuple(elts=targets), ast.Tuple(elts=values):
                for one, other in zip(targets, values, strict=False):
                    self._give(where, one, other)

    def _give_each(self, where: str, target: ast.expr, values: ast.expr) -> None:
        match target, values:
            case ast.Tuple(elts=[_, second]), ast.Call(func=ast.Name(id="enumerate"), args=[inner, *_]):
                self._give_each(where, second, inner)
            case ast.Tuple(elts=[_, second]), ast.Call(
                func=ast.Attribute(value=inner, attr="items" | "named_children")
            ):
                self._give_each(where, second, inner)
            case ast.Tuple(elts=targets), ast.Call(func=ast.Name(id="zip"), args=arguments):
                for one, inner in zip(targets, arguments, strict=False):
                    self._give_each(where, one, inner)
            case _, ast.Call(func=ast.Name(id="reversed" | "list" | "tuple" | "iter"), args=[inner]):
                self._give_each(where, target, inner)
            case _, ast.Call(func=ast.Attribute(value=inner, attr="values" | "children"), args=[]):
                self._give_each(where, target, inner)
            case ast.Name(id=name), ast.Tuple(elts=elements) | ast.List(elts=elements):
                for element in elements:
                    self._add(where, name, self.paths(where, element))
            case ast.Name(id=name), _:
                self._add(where, name, {(*path, "*") for path in self.paths(where, values)})

    def paths(self, where: str, node: ast.expr) -> set[_Path]:
        """The modules that an expression may be."""
        match node:
            case ast.Name(id=name):
                return self.known[where].get(name, set())
            case (
                ast.Attribute(value=value, attr=name)
                | ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str(name)), *_])
            ):
                return {(*path, name) for path in self.paths(where, value) if len(path) < _DEPTH}
            case ast.Subscript(value=value, slice=ast.Slice()):
                return self.paths(where, value)
            case ast.Subscript(value=value, slice=place):
                name = str(place.value) if isinstance(place, ast.Constant) else "*"
                return {(*path, name) for path in self.paths(where, value) if len(path) < _DEPTH}
            case ast.IfExp(body=one, orelse=other):
                return self.paths(where, one) | self.paths(where, other)
        return set()

    def read_in(self, tree: ast.AST, where: str) -> Iterator[Read]:
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                continue
            if isinstance(node, ast.Attribute) and node.attr in _NOT_THE_VALUES:
                continue
            if isinstance(node, ast.Attribute) and node.attr in _WEIGHTS:
                yield from ((path, node.attr) for path in self.paths(where, node.value) if path)
            yield from self.read_in(node, where)
