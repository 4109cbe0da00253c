# SPDX-License-Identifier: Apache-2.0
"""Finds from its jaxpr whether a function is linear in its parameters.

The windows that move with the weights are valid for ``x = ⟨P, θ⟩``, feature by feature. For
an unknown layer, ``why_not_linear`` follows the parameters through the operations without
running them. Each value is constant, zero, or linear. A linear value has an axis along
which entry c depends on entry c of the parameters' last axis alone.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, Literal


class _Kind:
    """A value that does not depend on the parameters."""

    def __init__(self, name: str):
        self.name = name


CONSTANT, ZERO = _Kind("constant"), _Kind("zero")


class _Axis(NamedTuple):
    """The axis of the features in a linear value.

    Attributes:
      place: the axis.
      times: number of times the features occur in it, one after the other. ``vmap`` of a
        convolution temporarily joins another axis with them.
    """

    place: int
    times: int


Value = _Kind | _Axis


class _NotLinearError(Exception):
    pass


def why_not_linear(apply: Callable[..., jax.Array], params: Any, inputs: Any) -> str | None:
    """Finds the reason why a layer is not linear in its parameters, feature by feature.

    Args:
      apply: ``(params, inputs) -> x``, with the features of ``x`` last.
      params: pytree whose leaves have features last; the arrays may be abstract.
      inputs: pytree of arrays, which may be abstract.

    Returns:
      None if the layer is linear. Otherwise the end of a sentence about the layer, such as
      "applies rsqrt to its parameters".
    """
    closed = jax.make_jaxpr(apply)(params, inputs)
    leaves = jax.tree.leaves(params)
    if any(leaf.ndim == 0 for leaf in leaves):
        return "has a parameter without an axis of features"
    axes = [_Axis(leaf.ndim - 1, 1) for leaf in leaves]
    rest = [CONSTANT] * (len(closed.in_avals) - len(leaves))
    try:
        found = _follow(closed.jaxpr, [*axes, *rest])
    except _NotLinearError as reason:
        return str(reason)
    out: Any = closed.out_avals[0]
    if found == [_Axis(out.ndim - 1, 1)]:
        return None
    return "gives an output whose last axis is not that of its parameters' features"


def _follow(jaxpr: Jaxpr, values: list[Value]) -> list[Value]:
    """The values of the outputs from those of the inputs."""
    known = dict(zip(jaxpr.invars, values, strict=True))
    known |= dict.fromkeys(jaxpr.constvars, CONSTANT)

    def read(atom):
        if isinstance(atom, Literal):
            return ZERO if _is_zero(atom.val) else CONSTANT
        return known[atom]

    for equation in jaxpr.eqns:
        found = _apply(equation, [read(atom) for atom in equation.invars])
        known |= dict(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _is_zero(value: Any) -> bool:
    return bool(jax.numpy.ndim(value) == 0 and value == 0)


def _apply(equation: Any, values: list[Value]) -> list[Value]:
    """The values of one operation's outputs."""
    name, outs = equation.primitive.name, equation.outvars
    inner = _inner(equation)
    if inner is not None and len(inner.invars) == len(values):
        return _follow(inner, values)
    if not any(isinstance(value, _Axis) for value in values):
        keeps = name in ("broadcast_in_dim", "convert_element_type", "reshape")
        kind = ZERO if keeps and values[0] is ZERO else CONSTANT
        return [kind] * len(outs)
    rule = _RULES.get(name)
    axis = None if rule is None else rule(equation, values)
    if axis is None:
        raise _NotLinearError(f"applies {name} to its parameters")
    return [axis] * len(outs)


def _inner(equation: Any) -> Jaxpr | None:
    """The body of a call: jit, remat, custom derivatives."""
    if equation.primitive.name in ("scan", "while", "cond"):
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        body = equation.params.get(name)
        jaxpr = getattr(body, "jaxpr", body)  # a closed one or an open one
        if isinstance(jaxpr, Jaxpr):
            return None if getattr(body, "consts", ()) else jaxpr
    return None


# One rule per operation. It returns the axis of the features in the output, or None if the
# output is not linear.


def _same(equation, values):
    return values[0]


def _convert(equation, values):
    """Whole numbers are rounded."""
    dtype = equation.outvars[0].aval.dtype
    return values[0] if jax.numpy.issubdtype(dtype, jax.numpy.floating) else None


def _sum(equation, values):
    """A sum of linear terms; a constant one would make it affine."""
    axes = {value for value in values if value is not ZERO}
    if CONSTANT in axes:
        raise _NotLinearError("adds something else to its parameters")
    return axes.pop() if len(axes) == 1 else None


def _mul(equation, values):
    axes = [value for value in values if isinstance(value, _Axis)]
    if len(axes) > 1:
        raise _NotLinearError("multiplies its parameters with each other")
    return axes[0]


def _div(equation, values):
    return values[0] if isinstance(values[0], _Axis) and values[1] is CONSTANT else None


def _select(equation, values):
    return _sum(equation, values[1:]) if isinstance(values[0], _Kind) else None


def _reshape(equation, values):
    """Keeps the features' distance in memory; other axes may join or leave theirs."""
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    place, times = values[0]
    features, distance = before[place] // times, math.prod(before[place + 1 :])
    for new, size in enumerate(after):
        if math.prod(after[new + 1 :]) == distance and size % features == 0 < size:
            return _Axis(new, size // features)
    return None


def _transpose(equation, values):
    place, times = values[0]
    return _Axis(equation.params["permutation"].index(place), times)


def _broadcast(equation, values):
    place, times = values[0]
    new = equation.params["broadcast_dimensions"][place]
    size = equation.invars[0].aval.shape[place]
    return _Axis(new, times) if equation.outvars[0].aval.shape[new] == size else None


def _without(axes: Any, axis: _Axis) -> _Axis | None:
    """The axis after other axes are removed."""
    if axis.place in axes:
        return None
    return axis._replace(place=axis.place - sum(other < axis.place for other in axes))


def _reduce(equation, values):
    return _without(equation.params["axes"], values[0])


def _squeeze(equation, values):
    return _without(equation.params["dimensions"], values[0])


def _whole(equation, values):
    """Slices of other axes."""
    axis = values[0]
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return axis if before[axis.place] == after[axis.place] else None


def _pad(equation, values):
    """Zeros along other axes."""
    axis = _whole(equation, values)
    if axis is None or values[1] is not ZERO:
        return None
    return axis if equation.params["padding_config"][axis.place] == (0, 0, 0) else None


def _gather(equation, values):
    """Rows by index, as in an embedding, with all features."""
    axis, numbers = values[0], equation.params["dimension_numbers"]
    if not isinstance(axis, _Axis) or isinstance(values[1], _Axis):
        return None
    size = equation.invars[0].aval.shape[axis.place]
    gone = *numbers.collapsed_slice_dims, *numbers.operand_batching_dims
    left = _without(gone, axis)
    if left is None or equation.params["slice_sizes"][axis.place] != size:
        return None
    return left._replace(place=numbers.offset_dims[left.place])


def _concatenate(equation, values):
    axis = _sum(equation, values)
    if axis is None or equation.params["dimension"] == axis.place:
        return None
    return axis


def _rev(equation, values):
    return None if values[0].place in equation.params["dimensions"] else values[0]


def _dot(equation, values):
    contract, batch = equation.params["dimension_numbers"]
    axis = _mul(equation, values)
    side = 0 if values[0] is axis else 1
    if axis.place in batch[side]:
        return axis._replace(place=batch[side].index(axis.place))
    free = _without((*contract[side], *batch[side]), axis)
    if free is None:
        return None
    before = len(batch[side])
    if side == 1:
        before = equation.invars[0].aval.ndim - len(contract[0])
    return free._replace(place=before + free.place)


def _conv(equation, values):
    axis = _mul(equation, values)
    numbers = equation.params["dimension_numbers"]
    if values[1] is not axis or equation.params["batch_group_count"] != 1:
        return None
    if axis.place != numbers.rhs_spec[0]:
        return None
    return axis._replace(place=numbers.out_spec[1])


_RULES = {
    **dict.fromkeys(
        (
            "neg",
            "copy",
            "reduce_precision",
            "sharding_constraint",
            "pvary",
            "pcast",
            "name",
        ),
        _same,
    ),
    **dict.fromkeys(("add", "sub", "add_any"), _sum),
    **dict.fromkeys(("slice", "dynamic_slice"), _whole),
    "pad": _pad,
    "convert_element_type": _convert,
    "mul": _mul,
    "div": _div,
    "select_n": _select,
    "reshape": _reshape,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "reduce_sum": _reduce,
    "squeeze": _squeeze,
    "concatenate": _concatenate,
    "rev": _rev,
    "gather": _gather,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
}
