"""Which layers are linear in their parameters, feature by feature."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import cbn_jax as cbn
from cbn_jax.core.linear import why_not_linear

rows, maps = jnp.ones((4, 6)), jnp.ones((2, 5, 6, 6))


class Equalized(nn.Dense):
    def param(self, name, *args, **kwargs):
        return 0.05 * super().param(name, *args, **kwargs)


class Preactivated(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        return super().__call__(nn.relu(inputs))


class WrapPadded(nn.Conv):
    @nn.compact
    def __call__(self, inputs):
        inputs = jnp.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
        return super().__call__(inputs)


def ensemble(layer, **options):
    return nn.vmap(
        layer, variable_axes={"params": 0}, split_rngs={"params": True}, **options
    )


MASK = jnp.tile(jnp.asarray([[1.0, 0.0], [0.0, 1.0]]), (3, 2))
Pruned = nn.map_variables(
    nn.Dense,
    "params",
    init=True,
    trans_in_fn=lambda v: jax.tree.map(lambda w: w * MASK if w.ndim == 2 else w, v),
)

LINEAR = {
    "dense": (nn.Dense(4), rows),
    "conv": (nn.Conv(4, (3, 3)), maps),
    "circular": (nn.Conv(4, (3, 3), padding="CIRCULAR"), maps),
    "reflect": (nn.Conv(4, (3, 3), padding="REFLECT"), maps),
    "causal": (nn.Conv(4, (3,), padding="CAUSAL"), maps[0]),
    "grouped": (nn.Conv(4, (3, 3), feature_group_count=2, strides=2), maps),
    "dilated": (
        nn.Conv(4, (3, 3), padding=2, input_dilation=2, kernel_dilation=(1, 2)),
        maps,
    ),
    "masked": (nn.Conv(4, (3, 3), mask=jnp.ones((3, 3, 6, 4)).at[0].set(0)), maps),
    "half": (nn.Conv(4, (3, 3), dtype=jnp.bfloat16), maps),
    "local": (nn.ConvLocal(4, (3, 3)), maps),
    "transposed": (nn.ConvTranspose(4, (3, 3), strides=(2, 2)), maps),
    "transposed, circular": (nn.ConvTranspose(4, (4, 4), (2, 2), padding="CIRCULAR"), maps),
    "general": (nn.DenseGeneral((3, 4), axis=(1, -1)), maps),
    "general, batched": (nn.DenseGeneral(4, batch_dims=(0,)), maps),
    "einsum": (nn.Einsum((6, 4), "...a,ab->...b"), rows),
    "einsum of each feature": (
        nn.Einsum((6,), "...a,a->...a", kernel_init=nn.initializers.ones),
        rows,
    ),
    "embedding": (nn.Embed(9, 4), jnp.arange(6).reshape(2, 3)),
    "ensemble": (ensemble(nn.Dense)(4), maps[0]),
    "ensemble of convolutions": (ensemble(nn.Conv)(4, (3,)), maps),
    "members last": (ensemble(nn.Dense, in_axes=1, out_axes=1)(4), maps[0]),
    "equalized": (Equalized(4), rows),
    "preactivated": (Preactivated(4), rows),
    "wrap": (WrapPadded(4, (3, 3), padding="VALID"), maps),
    "pruned": (Pruned(4), rows),
    "remat": (nn.remat(nn.Dense)(4), rows),
}


def of(name):
    layer, inputs = LINEAR[name]
    params = layer.init(jax.random.key(0), inputs)["params"]
    return lambda params, inputs: layer.apply({"params": params}, inputs), params, inputs


@pytest.mark.parametrize("name", LINEAR)
def test_layers_that_are_linear(name):
    assert why_not_linear(*of(name)) is None


@pytest.mark.parametrize("name", sorted(set(LINEAR) - {"embedding"}))
def test_they_are_what_they_are_said_to_be(name):
    """f(θ + θ') = f(θ) + f(θ'), and feature c does not see the entries of the others."""
    apply, params, inputs = of(name)
    inputs = jax.random.normal(jax.random.key(1), inputs.shape)
    noise = jax.tree.map(lambda p: jax.random.normal(jax.random.key(2), p.shape), params)

    @jax.jit
    def outputs(noise):
        both = jax.tree.map(jnp.add, params, noise)
        one = jax.tree.map(lambda n: n.at[..., 1].set(0.0), noise)
        return (
            apply(params, inputs),
            apply(noise, inputs),
            apply(both, inputs),
            apply(jax.tree.map(jnp.add, params, one), inputs),
        )

    a, b, both, one = map(np.float64, outputs(noise))
    tolerance = 0.1 if name == "half" else 1e-4
    np.testing.assert_allclose(both, a + b, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(one[..., 1], a[..., 1], atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(one[..., 0], both[..., 0], atol=tolerance, rtol=tolerance)


def straight_through_sign(a, b, dimension_numbers, precision=None, **options):
    sign = b + lax.stop_gradient(jnp.sign(b) - b)
    return lax.dot_general(a, sign, dimension_numbers)


def low_rank(params, inputs):
    return inputs @ params["kernel"] + inputs @ params["a"] @ params["b"]


def with_a_row_of_ones(params):
    return jnp.pad(params, ((0, 1), (0, 0)), constant_values=1.0)


def swapped(params, inputs):
    numbers = ("NWC", "WOI", "NWC")
    inputs = inputs[:, None, :4]
    return lax.conv_general_dilated(
        inputs, params[None], (1,), "VALID", dimension_numbers=numbers
    )


def parts_of_rows(params):
    return jax.vmap(lambda i: lax.dynamic_slice(params, (i, 0), (1, 2))[0])(jnp.arange(4))


def same(i, x):
    del i
    return x


OTHERS = {
    "square": ("applies integer_pow|applies square", lambda p, z: z @ p**2),
    "standardized": ("applies s", lambda p, z: z @ cbn.standardize(p)),
    "activation": ("applies max", lambda p, z: nn.relu(z @ p)),
    "offset": ("adds something else", lambda p, z: z @ p + 1.0),
    "product": ("multiplies its parameters", lambda p, z: z @ (p * p)),
    "reversed": ("applies rev", lambda p, z: z @ p[:, ::-1]),
    "other features": ("last axis", lambda p, z: (z @ p).T),
    "summed": ("applies reduce_sum", lambda p, z: z @ p + (z @ p).sum(-1, keepdims=True)),
    "quotient": ("applies div", lambda p, z: z @ (1.0 / p)),
    "sliced": ("applies slice", lambda p, z: jnp.tile(z @ p[:, :2], 2)),
    "padded by one": ("applies pad", lambda p, z: jnp.ones((4, 7)) @ with_a_row_of_ones(p)),
    "constant": ("last axis", lambda p, z: z),
    "joined": ("applies concatenate", lambda p, z: jnp.concatenate([z @ p, z @ p], -1)),
    "chosen": ("applies gt", lambda p, z: jnp.where(p > 0, p, 0.0)),
    "looped": ("applies while|applies scan", lambda p, z: lax.fori_loop(0, 2, same, z @ p)),
    "inputs as features": ("applies conv_general_dilated", lambda p, z: swapped(p, z)),
    "parts of rows": ("applies gather", lambda p, z: jnp.tile(parts_of_rows(p), 2)),
    "shuffled": ("applies gather", lambda p, z: z @ p[:, jnp.array([1, 0, 3, 2])]),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_functions_that_are_not(name):
    reason, function = OTHERS[name]
    came = why_not_linear(function, jnp.ones((6, 4)), rows)
    assert came is not None
    assert any(part in came for part in reason.split("|")), came


def test_several_parameters_that_are_not():
    params = {"kernel": jnp.ones((6, 4)), "a": jnp.ones((6, 4)), "b": jnp.ones((4, 4))}
    assert "multiplies" in why_not_linear(low_rank, params, rows)
    assert "without an axis" in why_not_linear(
        lambda p, z: z @ p["w"] * p["gain"], {"w": rows.T, "gain": jnp.float32(1)}, rows
    )
    layer = nn.Dense(4, dot_general=straight_through_sign)
    params = layer.init(jax.random.key(0), rows)["params"]
    came = why_not_linear(lambda p, z: layer.apply({"params": p}, z), params, rows)
    assert came == "applies sign to its parameters"


@pytest.mark.parametrize("name", ["masked", "transposed", "ensemble", "wrap", "general"])
def test_statistics_are_exact_with_moving_weights(name):
    """All positions remembered, the same inputs: the output has mean 0, deviation 1."""
    layer, inputs = LINEAR[name]
    inputs = jax.random.normal(jax.random.key(1), (8, *inputs.shape[1:]))
    estimator = cbn.replay_batch_norm(3, samples=2000)
    norm = cbn.linen.Norm(estimator, layer, use_running_average=False)
    variables = norm.init(jax.random.key(0), inputs)
    step = jax.jit(lambda v: norm.apply(v, inputs, mutable=["batch_stats"]))
    for i in range(4):
        y, updates = step(variables)
        axes = tuple(range(y.ndim - 1))
        np.testing.assert_allclose(y.mean(axes), 0.0, atol=1e-3)
        np.testing.assert_allclose(y.std(axes), 1.0, atol=2e-3)
        moved = jax.tree.map(
            lambda w, i=i: w + 0.2 * jax.random.normal(jax.random.key(i), w.shape),
            variables["params"]["layer"],
        )
        params = {**variables["params"], "layer": moved}
        variables = {"params": params, **updates}
    chex.assert_tree_all_finite(variables)
