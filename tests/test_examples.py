import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import cbn_jax as cbn
from cbn_jax.core.named import from_dict
from examples import off_policy
from examples.off_policy import Setup, estimator_of, init_agent, joint_values, train_values

pytestmark = pytest.mark.studies

SETUP = Setup(features=8)


@pytest.fixture
def halves(key):
    """Two batches of different distributions."""
    now, after = jax.random.normal(key, (2, 16, 4))
    return now, 2.0 * after + 1.0


@pytest.fixture
def critics(key, loose):
    return init_agent(key, SETUP).critics


# The program.


@pytest.mark.parametrize(
    ("target", "norm"),
    [("joint", ("batch_renorm", "none")), ("network", ("batch_norm",))],
)
def test_a_run(target, norm, loose):
    """A few updates, through the function of the command line."""
    config = off_policy.Config((target,), norm, seeds=(0, 1), steps=504, reports=2)
    console = Console(file=io.StringIO(), width=120)
    rows = off_policy.main(config, console)
    assert [row.norm for row in rows] == list(norm)
    for row in rows:
        assert row.curves.shape == (2, 2)
        assert np.isfinite(row.curves).all()
        assert np.isfinite(row.apart)
        assert 0 < row.loss < np.inf
    text = console.file.getvalue()
    assert "2 seeds" in text
    assert all(text.count(row.norm) for row in rows)


@pytest.mark.parametrize("option", ["--norm=batch", "--steps=7", "--steps=0", "--seeds"])
def test_wrong_options(option):
    with pytest.raises(SystemExit) as error:
        off_policy.cli([option])
    assert error.value.code != 0


def test_the_pendulum_at_rest():
    upright = off_policy.Pendulum(jnp.zeros(()), jnp.zeros(()))
    after, reward = off_policy.swing(upright, jnp.zeros(1))
    assert after == upright
    assert reward == 0
    _, hanging = off_policy.swing(upright._replace(angle=jnp.pi), jnp.zeros(1))
    np.testing.assert_allclose(hanging, -(np.pi**2), rtol=1e-5)


# The joint batch.


def member(critics, index):
    return jax.tree.map(lambda leaf: leaf[index], critics)


def by_hand(critic, halves):
    """Each half on its own, with the statistics of both."""
    estimator, params = estimator_of(SETUP), critic["params"]
    for i in range(2):
        dense, norm = params[f"Dense_{i}"], params[f"Norm_{i}"]
        halves = [z @ dense["kernel"] + dense["bias"][None] for z in halves]
        stats = critic["batch_stats"][f"Norm_{i}"]
        state = from_dict(stats, estimator.init(SETUP.features))
        statistics, _ = estimator.train(state, jnp.concatenate(halves))
        halves = [
            jax.nn.relu(cbn.normalize(z, statistics, norm["scale"], norm["bias"]))
            for z in halves
        ]
    last = params["Dense_2"]
    return [(z @ last["kernel"] + last["bias"][None])[:, 0] for z in halves]


def test_both_halves_are_normalized_as_one_batch(critics, halves):
    *values, _ = joint_values(critics, None, *halves, SETUP)
    for index in range(2):
        expected = by_hand(member(critics, index), halves)
        for value, each in zip(values, expected, strict=True):
            np.testing.assert_allclose(value[index], each, atol=1e-5)


def test_two_calls_give_other_values(critics, halves):
    *values, _ = joint_values(critics, None, *halves, SETUP)
    for value, half in zip(values, halves, strict=True):
        assert jnp.abs(value - train_values(critics, half, SETUP)[0]).max() > 0.1


def test_critics_have_statistics_of_their_own(critics, halves):
    _, _, updates = joint_values(critics, None, *halves, SETUP)
    states = updates["batch_stats"]
    for state in (states[f"Norm_{i}"] for i in range(2)):
        mean = state["mean"]
        assert mean.shape == (2, SETUP.features)
        assert (jnp.abs(mean[0] - mean[1]) > 1e-3).all()
        np.testing.assert_array_equal(state["steps"], 1)


# Which statistics.


@pytest.fixture
def batch(halves):
    now, after = halves
    return off_policy.Transitions(now[:, :3], now[:, 3:], now[:, 0], after[:, :3])


def test_the_batch_of_the_actor_enters_no_statistics(batch, key, loose):
    agent, _ = off_policy.update(init_agent(key, SETUP), batch, key, SETUP)
    for norm in agent.critics["batch_stats"].values():
        np.testing.assert_array_equal(norm["steps"], 1)


def test_the_target_averages_weights_and_statistics(batch, key, loose):
    setup = Setup(target="network", features=8, polyak=0.25)
    before = init_agent(key, setup)
    agent, _ = off_policy.update(before, batch, key, setup)
    expected = jax.tree.map(
        lambda old, new: 0.75 * old + 0.25 * new, before.target, agent.critics
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        agent.target,
        expected,
    )
