# SPDX-License-Identifier: Apache-2.0
"""Whether a function is linear in its parameters, read off its jaxpr without running it.

The windows that move with the weights hold for ``x = ⟨P, θ⟩``, feature by feature. For a
layer about which nothing is known, ``why_not_linear`` follows the parameters through the
operations. Each value is constant, zero, or linear, and a linear one has an axis whose
entry c depends on entry c of the parameters' last axis alone.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


class _Kind:
    """A value that does not depend on the parameters."""

    def __init__(self, name: str):
        self.name = name


CONSTANT, ZERO = _Kind("constant"), _Kind("zero")
Value = _Kind | int  # a number is the axis of the features


class _NotLinear(Exception):
    pass


def why_not_linear(apply: Callable[..., jax.Array], params: Any, inputs: Any) -> str | None:
    """Says why a layer is not linear in its parameters, feature by feature.

    Args:
      apply: ``(params, inputs) -> x``, with the features of ``x`` last.
      params: pytree whose leaves have features last; abstract arrays do.
      inputs: pytree of arrays; abstract ones do.

    Returns:
      None if it is linear; else the end of a sentence about the layer, such as "applies
      rsqrt to its parameters".
    """
    closed = jax.make_jaxpr(apply)(params, inputs)
    leaves = jax.tree.leaves(params)
    if any(leaf.ndim == 0 for leaf in leaves):
        return "has a parameter without an axis of features"
    axes = [leaf.ndim - 1 for leaf in leaves]
    rest = [CONSTANT] * (len(closed.in_avals) - len(leaves))
    try:
        found = _follow(closed.jaxpr, [*axes, *rest])
    except _NotLinear as reason:
        return str(reason)
    last = closed.out_avals[0].ndim - 1
    if len(found) == 1 and found[0] == last:
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
    if not any(isinstance(value, int) for value in values):
        keeps = name in ("broadcast_in_dim", "convert_element_type", "reshape")
        kind = ZERO if keeps and values[0] is ZERO else CONSTANT
        return [kind] * len(outs)
    rule = _RULES.get(name)
    axis = None if rule is None else rule(equation, values)
    if axis is None:
        raise _NotLinear(f"applies {name} to its parameters")
    return [axis] * len(outs)


def _inner(equation: Any) -> Jaxpr | None:
    """The body of a call: jit, remat, custom derivatives."""
    if equation.primitive.name in ("scan", "while", "cond"):
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        body = equation.params.get(name)
        if isinstance(body, ClosedJaxpr):
            return body.jaxpr if not body.consts else None
        if isinstance(body, Jaxpr):
            return body
    return None


# One rule per operation: the axis of the features in its output, None if it is not linear.


def _same(equation, values):
    return values[0]


def _sum(equation, values):
    """A sum of linear terms; a constant one would make it affine."""
    axes = {value for value in values if value is not ZERO}
    if CONSTANT in axes:
        raise _NotLinear("adds something else to its parameters")
    return axes.pop() if len(axes) == 1 else None


def _mul(equation, values):
    axes = [value for value in values if isinstance(value, int)]
    if len(axes) > 1:
        raise _NotLinear("multiplies its parameters with each other")
    return axes[0]


def _div(equation, values):
    return values[0] if isinstance(values[0], int) and values[1] is CONSTANT else None


def _select(equation, values):
    return _sum(equation, values[1:]) if isinstance(values[0], _Kind) else None


def _reshape(equation, values):
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    axis = values[0]
    front = math.prod(before[:axis])
    for place, size in enumerate(after):
        if size == before[axis] and math.prod(after[:place]) == front:
            return place
    return None


def _transpose(equation, values):
    return equation.params["permutation"].index(values[0])


def _broadcast(equation, values):
    place = equation.params["broadcast_dimensions"][values[0]]
    size = equation.invars[0].aval.shape[values[0]]
    return place if equation.outvars[0].aval.shape[place] == size else None


def _without(axes: Any, axis: int) -> int | None:
    """The place of an axis after others are gone."""
    return None if axis in axes else axis - sum(other < axis for other in axes)


def _reduce(equation, values):
    return _without(equation.params["axes"], values[0])


def _squeeze(equation, values):
    return _without(equation.params["dimensions"], values[0])


def _whole(equation, values):
    """Slices and pads of other axes."""
    if not isinstance(values[0], int) or any(isinstance(v, int) for v in values[1:]):
        return None
    if equation.primitive.name == "pad" and values[1] is not ZERO:
        return None
    if equation.primitive.name == "pad" and equation.params["padding_config"][
        values[0]
    ] != (0, 0, 0):
        return None
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return values[0] if before[values[0]] == after[values[0]] else None


def _concatenate(equation, values):
    axis = _sum(equation, values)
    return None if equation.params["dimension"] == axis else axis


def _rev(equation, values):
    return None if values[0] in equation.params["dimensions"] else values[0]


def _dot(equation, values):
    contract, batch = equation.params["dimension_numbers"]
    _mul(equation, values)
    side = 0 if isinstance(values[0], int) else 1
    axis = values[side]
    if axis in contract[side]:
        return None
    if axis in batch[side]:
        return batch[side].index(axis)
    free = _without((*contract[side], *batch[side]), axis)
    before = len(batch[side])
    if side == 1:
        taken = len(contract[0]) + len(batch[0])
        before += equation.invars[0].aval.ndim - taken
    return before + free


def _conv(equation, values):
    _mul(equation, values)
    numbers = equation.params["dimension_numbers"]
    fits = values[1] == numbers.rhs_spec[0] and equation.params["batch_group_count"] == 1
    return numbers.out_spec[1] if fits else None


_RULES = {
    **dict.fromkeys(
        (
            "neg",
            "copy",
            "convert_element_type",
            "reduce_precision",
            "sharding_constraint",
            "pvary",
            "pcast",
            "name",
        ),
        _same,
    ),
    **dict.fromkeys(("add", "sub", "add_any"), _sum),
    **dict.fromkeys(("slice", "dynamic_slice", "pad"), _whole),
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
    "dot_general": _dot,
    "conv_general_dilated": _conv,
}
