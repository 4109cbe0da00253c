"""Whole models without their norms predict what they did."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import cbn_jax as cbn
import cbn_jax.nnx
from cbn_jax.linen import Norm, fold, replace_batch_norm

IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))


class Conv(nn.Module):
    """A scanned block, whose variables are stacked."""

    @nn.compact
    def __call__(self, x, train):
        y = nn.Conv(8, (3, 3), use_bias=False)(x)
        return x + nn.relu(nn.BatchNorm(use_running_average=not train)(y)), None


class Net(nn.Module):
    """Layers with and without bias, transposed, stacked; norms of sums and along axis 1."""

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = norm(name="stem_norm")(nn.Conv(8, (3, 3), name="stem")(x))
        blocks = nn.scan(
            Conv,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=2,
        )
        x, _ = blocks(name="blocks")(x, train)
        x = nn.relu(norm(name="sum_norm", use_bias=False)(x))
        x = nn.ConvTranspose(6, (3, 3), strides=(2, 2), transpose_kernel=True, name="up")(x)
        x = norm(name="up_norm", use_scale=False)(x)
        x = norm(name="rows", axis=1)(nn.relu(x))
        return nn.Dense(4)(x.mean((1, 2)))


def trained(model, *train):
    """Variables whose statistics and affine parameters are no longer those of the start."""
    variables = model.init(jax.random.key(0), IMAGES, *train)

    @jax.jit
    def step(variables):
        _, updates = model.apply(variables, IMAGES * 2 + 1, *train, mutable=["batch_stats"])
        return {**variables, **updates}

    for _ in range(3):
        variables = step(variables)
    noise = iter(jax.random.split(jax.random.key(2), 100))
    params = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(next(noise), p.shape), variables["params"]
    )
    return {**variables, "params": params}


MODELS = {
    "batch norm": Net(),
    "replaced": replace_batch_norm(Net(), cbn.small_batch_norm(2)),
    "another method": replace_batch_norm(Net(), cbn.diminishing_batch_norm()),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_folded_model_predicts_the_same(name):
    model = MODELS[name]
    variables = trained(model, True)
    before = jax.tree.map(jnp.copy, variables)
    shape = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
    folded, small = fold(model, variables, shape, False)
    chex.assert_trees_all_equal(variables, before)  # nothing is changed in place
    assert set(small) == {"params"}
    expected = model.apply(variables, IMAGES, False)
    np.testing.assert_allclose(folded.apply(small, IMAGES, False), expected, atol=2e-5)
    left = {place: set(small["params"].get(place, ())) for place in small["params"]}
    assert "stem_norm" not in left  # the layer's bias took it in
    assert left["sum_norm"] == left["rows"] == {"scale", "bias"}
    assert set(small["params"]["blocks"]["BatchNorm_0"]) == {"bias"}


class Hand(nn.Module):
    kernel: object = None

    @nn.compact
    def __call__(self, x, running):
        conv = nn.Conv(8, (3, 3), use_bias=False)
        small = cbn.small_batch_norm(2)
        x = Norm(small, conv, kernel=self.kernel, use_running_average=running)(x)
        x = Norm(cbn.frozen(cbn.batch_norm(), 2), use_running_average=running)(nn.relu(x))
        return nn.Dense(4)(x.mean((1, 2)))


@pytest.mark.parametrize("kernel", [None, cbn.standardize])
def test_norms_written_by_hand(kernel):
    model = Hand(kernel)
    variables = trained(model, False)
    folded, small = fold(model, variables, IMAGES, True)
    expected = model.apply(variables, IMAGES, True)
    np.testing.assert_allclose(folded.apply(small, IMAGES, True), expected, atol=2e-5)


class Shared(nn.Module):
    """One convolution with a norm for each level, as in RetinaNet."""

    @nn.compact
    def __call__(self, x, train):
        conv = nn.Conv(3, (3, 3), name="conv")
        for level in range(2):
            norm = nn.BatchNorm(use_running_average=not train, name=f"norm_{level}")
            x = nn.relu(norm(conv(x)))
        return x


class AlsoWithout(nn.Module):
    """The model uses the output of the layer also without the norm."""

    @nn.compact
    def __call__(self, x, train):
        y = nn.Conv(3, (3, 3))(x)
        return y + nn.BatchNorm(use_running_average=not train, name="norm")(y)


def test_a_layer_of_several_norms_stays():
    variables = trained(Shared(), True)
    folded, small = fold(Shared(), variables, IMAGES, False)
    chex.assert_trees_all_equal(small["params"]["conv"], variables["params"]["conv"])
    expected = Shared().apply(variables, IMAGES, False)
    np.testing.assert_allclose(folded.apply(small, IMAGES, False), expected, atol=2e-5)


def test_a_layer_that_is_used_otherwise_too():
    variables = trained(AlsoWithout(), True)
    with pytest.raises(ValueError, match=r"would change by .*without_layer="):
        fold(AlsoWithout(), variables, IMAGES, False)
    folded, small = fold(AlsoWithout(), variables, IMAGES, False, without_layer=("norm",))
    expected = AlsoWithout().apply(variables, IMAGES, False)
    np.testing.assert_allclose(folded.apply(small, IMAGES, False), expected, atol=2e-5)


def test_what_cannot_be_folded():
    model = replace_batch_norm(Net(), cbn.group_norm(2))
    with pytest.raises(ValueError, match=r"whose inference depends on the example"):
        fold(model, model.init(jax.random.key(0), IMAGES, False), IMAGES, False)
    dense = nn.Dense(2)
    with pytest.raises(ValueError, match="fold got a model without a norm"):
        fold(dense, dense.init(jax.random.key(0), IMAGES), IMAGES)
    with pytest.raises(ValueError, match="fold got a model without a norm"):
        cbn_jax.nnx.fold(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), IMAGES)


def test_a_learned_method_cannot_be_folded():
    learned = cbn.learned(cbn.group_batch_norm, num_groups=2)
    model = nn.Sequential([nn.Dense(4), Norm(learned, use_running_average=True)])
    variables = model.init(jax.random.key(0), IMAGES)
    with pytest.raises(ValueError, match=r"whose inference depends on the example"):
        fold(model, variables, IMAGES)


def test_tokens_may_be_abstract():
    norm = nn.BatchNorm(use_running_average=True)
    model = nn.Sequential([nn.Embed(9, 4), nn.Dense(4), norm])
    tokens = jnp.arange(6).reshape(2, 3)
    variables = model.init(jax.random.key(0), tokens)
    folded, small = fold(model, variables, jax.ShapeDtypeStruct((2, 3), jnp.int32))
    expected = model.apply(variables, tokens)
    np.testing.assert_allclose(folded.apply(small, tokens), expected, atol=1e-5)


def test_a_folded_model_is_exported_for_any_batch():
    variables = trained(Net(), True)
    folded, small = fold(Net(), variables, IMAGES, False)
    leaves, form = jax.tree.flatten(small)

    def predict(leaves, images):
        return folded.apply(jax.tree.unflatten(form, leaves), images, False)

    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, 8, 8, 3"), jnp.float32)
    exported = export.export(jax.jit(predict))(leaves, shape)
    again = export.deserialize(exported.serialize())
    expected = folded.apply(small, IMAGES[:1], False)
    np.testing.assert_allclose(again.call(leaves, IMAGES[:1]), expected, atol=1e-5)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(8, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 6, (3, 3), (2, 2), transpose_kernel=True, rngs=rngs)
        self.bn2 = nnx.BatchNorm(6, use_scale=False, rngs=rngs)
        self.bn3 = nnx.BatchNorm(6, rngs=rngs)
        self.norm = cbn_jax.nnx.Norm(
            cbn.small_batch_norm(2), layer=nnx.Conv(6, 4, (1, 1), rngs=rngs), rngs=rngs
        )

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(self.bn2(self.up(x)))
        return self.norm(self.bn3(x))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folded_nnx_model_predicts_the_same(replaced):
    model = NnxNet(nnx.Rngs(0))
    if replaced:
        model = cbn_jax.nnx.replace_batch_norm(model, cbn.small_batch_norm(2), IMAGES)
    run = nnx.jit(lambda model, x: model(x))
    for _ in range(3):
        run(model, IMAGES * 2 + 1)
    before = nnx.to_pure_dict(nnx.state(model))
    folded = cbn_jax.nnx.fold(model, jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype))
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), before)
    model.eval()
    np.testing.assert_allclose(folded(IMAGES), run(model, IMAGES), atol=2e-5)
    assert not nnx.state(folded, nnx.BatchStat)
    assert type(folded.conv1) is nnx.Conv
    assert (folded.bn1.scale, folded.bn2.bias) == (None, None)
