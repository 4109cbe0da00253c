"""Estimators and schedules print, compare, hash and pickle as their call."""

import copy
import dataclasses
import functools
import inspect
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FACTORIES, LAYERS, fresh, init, train

import cbn_jax as cbn
from cbn_jax import diagnostics

SCHEDULES = {
    "exponential": functools.partial(cbn.exponential, 0.9),
    "cumulative": cbn.cumulative,
    "diminishing": functools.partial(cbn.diminishing, 2.0),
    "ramp": functools.partial(cbn.ramp, 3),
}
OTHERS = {
    "learned": functools.partial(cbn.learned, cbn.group_batch_norm, num_groups=2),
    "watch": lambda: diagnostics.watch({"a": cbn.batch_norm()}, use="a"),
    "reference": lambda: diagnostics.reference({"a": cbn.batch_norm()}, use="a"),
}
VALUES = FACTORIES | SCHEDULES | OTHERS
values = pytest.mark.parametrize("name", VALUES)


def halving(m):
    return 0.5**m


@values
def test_equal_calls_make_equal_values(name):
    one, other = VALUES[name](), VALUES[name]()
    assert one is not other
    assert one == other
    assert hash(one) == hash(other)


def test_different_calls_make_different_values():
    made = [make() for make in VALUES.values()]
    assert len(set(made)) == len(made)
    assert cbn.batch_norm() != cbn.batch_norm(0.9)
    assert cbn.batch_norm() != cbn.small_batch_norm(32)
    assert cbn.batch_norm() != "batch_norm(momentum=0.99, epsilon=1e-05)"


def test_arguments_given_by_place_by_name_or_by_default_are_the_same():
    assert cbn.batch_norm() == cbn.batch_norm(0.99) == cbn.batch_norm(momentum=0.99)


@values
def test_repr_is_the_call_that_makes_it(name):
    value = VALUES[name]()
    names = {each: getattr(cbn, each) for each in cbn.__all__}
    assert eval(repr(value), names | vars(diagnostics) | {"fresh": fresh}) == value


def test_repr_names_every_argument():
    assert repr(cbn.small_batch_norm(2)) == (
        "small_batch_norm(batch_size=2, micro_batches=1, momentum=0.99, epsilon=1e-05)"
    )
    wrapped = cbn.corrected_inference(cbn.batch_norm(halving), examples=np.float32(4))
    assert repr(wrapped) == (
        "corrected_inference(estimator=batch_norm(momentum=halving, epsilon=1e-05), "
        "examples=4.0)"
    )
    assert repr(cbn.learned(cbn.group_batch_norm, num_groups=8)) == (
        "learned(group_batch_norm, num_groups=8)"
    )


@values
def test_values_pickle_and_copy(name):
    value = VALUES[name]()
    for same in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
        assert same == value
        assert hash(same) == hash(value)


def test_a_pickled_estimator_trains(key):
    layer = LAYERS["dense"]
    params, z = layer.params(key), layer.data(key)
    estimator = cbn.streaming_batch_norm(window=3)
    same = pickle.loads(pickle.dumps(estimator))
    chex.assert_trees_all_equal(
        *(train(e, init(e, layer, params), layer, params, z) for e in (estimator, same))
    )


def test_functions_compare_as_functions_do():
    assert cbn.batch_norm(halving) == cbn.batch_norm(halving)
    assert cbn.batch_norm(halving) != cbn.batch_norm(lambda m: 0.5**m)
    schedule = optax.linear_schedule(0.9, 0.1, 4)
    assert cbn.diminishing_batch_norm(schedule) == cbn.diminishing_batch_norm(schedule)
    assert cbn.batch_norm(cbn.cumulative()) == cbn.batch_norm(cbn.cumulative())
    assert cbn.batch_norm(cbn.cumulative()) != cbn.batch_norm(cbn.diminishing())


def test_arrays_compare_by_dtype_shape_and_content():
    def mixed(mix):
        return cbn.group_batch_norm(mix, num_groups=2)

    assert mixed(jnp.array([0.1, 0.2])) == mixed(jnp.array([0.1, 0.2]))
    assert hash(mixed(np.ones(2))) == hash(mixed(np.ones(2)))
    assert mixed(jnp.array([0.1, 0.2])) != mixed(jnp.array([0.1, 0.3]))
    assert mixed(np.zeros(2, np.float32)) != mixed(np.zeros(2, np.int32))
    assert mixed(np.ones(1)) != mixed(np.ones((1, 1)))


def test_traced_arrays_compare_by_identity():
    @jax.jit
    def compare(mix, other):
        one = cbn.group_batch_norm(mix, num_groups=2)
        assert one == cbn.group_batch_norm(mix, num_groups=2)
        assert one != cbn.group_batch_norm(other, num_groups=2)
        assert "group_batch_norm(mix=" in repr(one)
        return mix

    compare(0.5, 0.5)


def test_a_changed_estimator_is_one_of_its_own():
    """It has no call: it compares by identity, and cannot be pickled."""
    estimator = cbn.batch_norm()
    changed = dataclasses.replace(estimator, epsilon=1e-3)
    assert changed == changed
    assert changed != estimator
    assert changed != dataclasses.replace(estimator, epsilon=1e-3)
    assert "Estimator object at" in repr(changed)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(changed)


def test_a_factory_does_not_rename_what_it_was_given():
    inner = cbn.batch_norm()
    outer = pickle.loads(pickle.dumps(cbn.corrected_inference(inner, examples=2)))
    assert repr(inner) == "batch_norm(momentum=0.99, epsilon=1e-05)"
    assert outer.epsilon == inner.epsilon
    assert returned(inner) != inner
    assert repr(inner) == "batch_norm(momentum=0.99, epsilon=1e-05)"


@cbn.factory
def returned(estimator):
    return estimator


@cbn.factory
def with_steps(steps):
    return cbn.ramp(sum(steps))


def test_lists_compare_by_their_entries():
    assert with_steps([1, 2]) == with_steps([1, 2])
    assert hash(with_steps([1, 2])) == hash(with_steps((1, 2)))
    assert with_steps([1, 2]) != with_steps([3])


def test_an_estimator_is_a_static_argument(key):
    x = jax.random.normal(key, (4, 2))

    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(1)
    def mean(estimator, x):
        return estimator.train(estimator.init(2), x)[0].mean

    chex.clear_trace_counter()
    for _ in range(3):
        mean(cbn.batch_norm(), x)


@pytest.mark.parametrize("name", FACTORIES)
def test_an_estimator_carries_its_epsilon(name):
    published = 1e-6 if name == "filter_response_norm" else 1e-5
    assert FACTORIES[name]().epsilon == published
    assert FACTORIES[name](epsilon=1e-3).epsilon == 1e-3


def test_factories_keep_signature_and_docstring():
    signature = inspect.signature(cbn.batch_norm)
    assert list(signature.parameters) == ["momentum", "epsilon"]
    assert signature.return_annotation is cbn.Estimator
    assert "Ioffe" in cbn.batch_norm.__doc__
    with pytest.raises(TypeError, match=r"batch_norm\(\) got an unexpected .*'decay'"):
        cbn.batch_norm(decay=0.9)


def test_from_32_examples_on_the_recommended_method_is_batch_norm(key):
    """State, statistics and program are those of batch norm; errors name the caller."""
    layer, x = LAYERS["dense"], jax.random.normal(key, (32, 4))
    small, plain = cbn.small_batch_norm(32), cbn.batch_norm()
    state = init(small, layer, layer.params(key))
    chex.assert_trees_all_equal(state, plain.init(4))
    programs = [str(jax.make_jaxpr(e.train)(state, x)) for e in (small, plain)]
    assert programs[0] == programs[1]
    with pytest.raises(ValueError, match=r"^small_batch_norm got x of shape \(1, 4\)"):
        small.train(state, x[:1])


def test_the_window_holds_32_examples():
    expected = {1: 32, 2: 16, 3: 11, 5: 7, 8: 4, 16: 2, 20: 2, 31: 2}
    key, layer = jax.random.key(0), LAYERS["dense"]
    params, z = layer.params(key), layer.data(key)
    for batch_size, window in expected.items():
        small = cbn.small_batch_norm(batch_size)
        exact = cbn.streaming_batch_norm(window)
        states = [init(e, layer, params) for e in (small, exact)]
        for _ in range(2):
            states = [
                train(e, s, layer, params, z)[2]
                for e, s in zip((small, exact), states, strict=True)
            ]
        chex.assert_trees_all_equal(*states)
