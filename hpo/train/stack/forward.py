"""The forward pass of K models of one architecture as one model.

torch.fx traces a model into layers and functions, each with a stacked form (`layers.py`). If one has no stacked form,
Unstackable names it, and the model is trained by another executor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hpo.data import each
from hpo.models.drawing import DRAWING
from hpo.train.inputs import Batch
from hpo.train.stack.layers import OF_INPUT, RULES, Layout, Pass, Unstackable, flatten, joined, laid_out


class StackedForward:
    """Maps inputs of K models to outputs [K, O, B]."""

    name = "stack"
    lanes = 16  # widest vector of a CPU, in numbers: the incomplete last vector of a tensor may be rounded differently

    def __init__(self, model: nn.Module, inputs: Batch | None = None) -> None:
        """Trace a model; Unstackable if it has a part without a stacked form.

        Args:
            inputs: a few inputs, of which only the number of dimensions counts; None: images.
        """
        self._dims: Any = IMAGES if inputs is None else each(inputs, Tensor.dim)
        try:
            graph = Tracer().trace(model)
        except Exception as error:  # a user's forward may do anything with a traced value
            raise Unstackable(f"torch.fx cannot trace the model: {type(error).__name__}: {error}") from error
        self._names = _names(model)
        self._steps: list[tuple[str, Callable[..., Tensor], tuple[Any, ...]]] = []
        self._layouts: dict[str, Layout] = {}
        self._raw: dict[str, Any] = {}  # by name of a value that is the input or one of its tensors: its dimensions
        self._result = ""
        modules = dict(model.named_modules())
        for node in graph.nodes:
            self._add(node, modules)

    def __call__(self, at: Pass, inputs: Batch) -> Tensor:
        """Return the outputs [K, O, B] of inputs [K, B, ...], or of inputs [B, ...] for all models."""
        values: dict[str, Any] = {"": self._for_each_model(at, inputs)}
        for name, operation, arguments in self._steps:
            found = [values[argument.name] if isinstance(argument, _Value) else argument for argument in arguments]
            values[name] = operation(at, *found)
        outputs: Tensor = values[self._result]
        return outputs

    def _for_each_model(self, at: Pass, inputs: Batch) -> Batch:
        """Return inputs [K, B, ...]."""
        if isinstance(inputs, dict):
            return {name: _expanded(at, one, self._dims[name]) for name, one in inputs.items()}
        return _expanded(at, inputs, self._dims)

    # --- from a graph to steps --------------------------------------------------------------------------------------

    def _add(self, node: fx.Node, modules: Mapping[str, nn.Module]) -> None:
        if node.op == "placeholder":
            if self._layouts:
                raise Unstackable("the model's forward takes more than one input")
            self._layouts[node.name] = "input"
            self._raw[node.name] = self._dims
            self._steps.append((node.name, lambda _at, x: x, (_Value(""),)))
        elif node.op == "call_module":
            self._add_module(node, modules[str(node.target)])
        elif node.op in ("call_function", "call_method"):
            self._add_function(node)
        elif node.op == "output":
            self._end(node.args[0])
        else:
            _refuse(node, "is used outside of a layer")

    def _add_module(self, node: fx.Node, module: nn.Module) -> None:
        rule = RULES.get(type(module))
        if rule is None or len(node.args) != 1 or node.kwargs:
            raise Unstackable(f"layer {node.target} ({type(module).__name__}) has no stacked form")
        source = self._value(node.args[0]) if type(module) in OF_INPUT else self._laid_out(node.args[0])
        operation, layout = rule(module, self._names[str(node.target)], self._layouts[source.name])
        self._step(node, operation, (source,), layout)

    def _add_function(self, node: fx.Node) -> None:
        if not node.args:
            _refuse(node, "gets its value by keyword")
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0].name in self._raw:
            self._add_tensor(node)
        elif node.target in (torch.cat, torch.concat):
            self._add_joined(node)
        elif node.target in (torch.flatten, "flatten"):
            if {"start_dim": 0, "end_dim": -1, **dict(zip(DIMS, node.args[1:], strict=False)), **node.kwargs} != BEHIND:
                _refuse(node, "flattens other dimensions than all after the first")
            source = self._value(node.args[0])
            operation, layout = flatten(None, "", self._layouts[source.name])
            self._step(node, operation, (source,), layout)
        elif node.target in TOGETHER:
            self._add_together(node, TOGETHER[node.target])
        elif node.target in FUNCTIONS:
            function = FUNCTIONS[node.target]
            source, rest, options = self._laid_out(node.args[0]), node.args[1:], dict(node.kwargs)
            if any(isinstance(other, fx.Node) for other in (*rest, *options.values())):
                _refuse(node, "takes a computed value where a constant is needed")
            layout = self._layouts[source.name]
            if function in SPATIAL and layout != "images":
                _refuse(node, "pools values that are not images")
            self._step(node, lambda _at, x: function(x, *rest, **options), (source,), layout)
        else:
            _refuse(node, "has no stacked form")

    def _add_tensor(self, node: fx.Node) -> None:
        """Add the choice of one tensor of an input of several by name."""
        source, name = self._value(node.args[0]), node.args[1]
        dims = self._raw[source.name]
        if not isinstance(dims, dict) or name not in dims:
            _refuse(node, f"takes {name!r} of the input, which has no tensor of that name")
        self._raw[node.name] = dims[name]
        self._step(node, lambda _at, inputs: inputs[name], (source,), "input")

    def _add_joined(self, node: fx.Node) -> None:
        """Add the concatenation of flat features."""
        parts, dim = node.args[0], dict(zip(("dim",), node.args[1:], strict=False)) | dict(node.kwargs)
        if not isinstance(parts, list | tuple) or dim not in ({"dim": 1}, {"dim": -1}):
            _refuse(node, "joins along another dimension than that of features")
        values = tuple(self._laid_out(part) for part in parts)
        if {self._layouts[value.name] for value in values} != {"dense"}:
            _refuse(node, "joins values that are not flat features")
        self._step(node, lambda _at, *found: joined(found), values, "dense")

    def _add_together(self, node: fx.Node, function: Callable[..., Tensor]) -> None:
        """Add an operation on two values, or on a value and a number."""
        if len(node.args) != 2 or node.kwargs:
            _refuse(node, "takes more than two values")
        arguments = tuple(
            self._laid_out(argument) if isinstance(argument, fx.Node) else argument for argument in node.args
        )
        layouts = {self._layouts[argument.name] for argument in arguments if isinstance(argument, _Value)}
        if len(layouts) != 1 or not all(isinstance(a, _Value | int | float) for a in arguments):
            _refuse(node, "joins an image and flat features, or something else")
        self._step(node, lambda _at, one, other: function(one, other), arguments, layouts.pop())

    def _end(self, returned: Any) -> None:
        if not isinstance(returned, fx.Node) or self._layouts.get(returned.name) != "dense":
            raise Unstackable("the model does not return flat outputs [B, O]")
        self._result = returned.name

    def _value(self, argument: Any) -> _Value:
        if not isinstance(argument, fx.Node):
            raise Unstackable(f"{argument!r} is used where a computed value is expected")
        return _Value(argument.name)

    def _laid_out(self, argument: Any) -> _Value:
        """Return a value; a model's own input is laid out by its dimensions first."""
        value = self._value(argument)
        if self._layouts[value.name] != "input":
            return value
        name = f"{value.name}, laid out"
        if name not in self._layouts:
            dims = self._raw[value.name]
            if isinstance(dims, dict):
                raise Unstackable("a layer takes several tensors by name")
            operation, self._layouts[name] = laid_out(dims)
            self._steps.append((name, operation, (value,)))
        return _Value(name)

    def _step(
        self, node: fx.Node, operation: Callable[..., Tensor], arguments: tuple[Any, ...], layout: Layout
    ) -> None:
        self._layouts[node.name] = layout
        self._steps.append((node.name, operation, arguments))


@dataclass(frozen=True)
class _Value:
    """The name of a value that is computed by an earlier step."""

    name: str


class Tracer(fx.Tracer):
    """torch.fx's tracer, which does not trace into layers that we know."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in RULES or isinstance(m, DRAWING) or super().is_leaf_module(m, module_qualified_name)


def _expanded(at: Pass, x: Tensor, dims: int) -> Tensor:
    return x.expand(at.count, *x.shape) if x.ndim == dims else x


def _names(model: nn.Module) -> dict[str, str]:
    """Return for each name of a layer its first name, under which its parameters are listed."""
    first: dict[nn.Module, str] = {}
    return {name: first.setdefault(module, name) for name, module in model.named_modules(remove_duplicate=False)}


def _refuse(node: fx.Node, why: str) -> NoReturn:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    raise Unstackable(f"{target} (at {node.name}) {why}")


IMAGES = 4  # dimensions of a batch of images
DIMS = ("start_dim", "end_dim")
BEHIND = {"start_dim": 1, "end_dim": -1}  # the first dimension
SPATIAL: set[Any] = {F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.avg_pool2d, F.max_pool2d}
ALIKE: tuple[Any, ...] = (
    F.elu,
    F.gelu,
    F.hardsigmoid,
    F.hardswish,
    F.hardtanh,
    F.leaky_relu,
    F.mish,
    F.relu,
    F.relu6,
    F.selu,
    F.silu,
    F.softplus,
    torch.relu,
    torch.sigmoid,
    torch.tanh,
)
FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    **{function: function for function in (*SPATIAL, *ALIKE)},
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
#: Operations on two values of the same layout, or on a value and a number.
TOGETHER: dict[Any, Callable[..., Tensor]] = {
    operator.add: operator.add,
    operator.iadd: operator.add,
    operator.sub: operator.sub,
    operator.mul: operator.mul,
    operator.imul: operator.mul,
    torch.add: operator.add,
    torch.mul: operator.mul,
    "add": operator.add,
    "add_": operator.add,
    "mul": operator.mul,
    "mul_": operator.mul,
}
