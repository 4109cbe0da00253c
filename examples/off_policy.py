# SPDX-License-Identifier: Apache-2.0
"""Off-policy reinforcement learning without a target network, after CrossQ.

A deterministic actor and two critics learn to swing up a pendulum. Each target network and
norm is trained with the same seeds, steps and learning rate, and a table compares them.

Run it with ``python -m examples.off_policy``.

Reference: Aditya Bhatt, Daniel Palenicek, Boris Belousov, Max Argus, Artemij Amiranashvili,
Thomas Brox, Jan Peters, "CrossQ: Batch Normalization in Deep Reinforcement Learning for
Greater Sample Efficiency and Simplicity", ICLR 2024, arXiv:1902.05605.
"""

import dataclasses
import functools
import itertools
import sys
import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import optax
    import tyro
    from flax import linen as nn
    from rich.console import Console
    from rich.markdown import Markdown

import cbn_jax
from benchmarks.lib import report, runs
from cbn_jax.linen import Norm

TargetName = Literal["joint", "network"]
NormName = Literal["batch_renorm", "batch_norm", "none"]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What one run is made of; hashable, for ``jax.jit``."""

    target: TargetName = "joint"
    norm: NormName = "batch_renorm"
    features: int = 32
    batch_size: int = 256
    learning_rate: float = 2e-3
    discount: float = 0.98
    reward_scale: float = 0.1  # normalized features cannot reach large values soon
    warmup_steps: int = 500  # of the norm, in updates
    random_steps: int = 500  # before the first update
    polyak: float = 0.005  # step of the target network
    noise: float = 0.2  # of actions while learning
    actor_every: int = 2  # updates of the critics


# The pendulum, with the constants of Gym's: torque in [-2, 2], speed in [-8, 8].

EPISODE = 200  # steps; a limit of time, not an end, so that values go on after it


class Pendulum(NamedTuple):
    """The angle and speed of the pendulum; at angle 0 it is upright."""

    angle: jax.Array
    speed: jax.Array


def reset(key: jax.Array) -> Pendulum:
    """Anywhere, and slow."""
    angle, speed = jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0)
    return Pendulum(jnp.pi * angle, speed)


def swing(pendulum: Pendulum, action: jax.Array) -> tuple[Pendulum, jax.Array]:
    """50 ms after an action ``[1]`` in [-1, 1], and the reward, at most 0."""
    angle, speed = pendulum
    away = (angle + jnp.pi) % (2.0 * jnp.pi) - jnp.pi
    cost = away**2 + 0.1 * speed**2 + 0.004 * action[0] ** 2
    pull = 15.0 * jnp.sin(angle) + 6.0 * action[0]
    speed = jnp.clip(speed + 0.05 * pull, -8.0, 8.0)
    return Pendulum(angle + 0.05 * speed, speed), -cost


def observe(pendulum: Pendulum) -> jax.Array:
    """``[3]``, of about the same scale."""
    angle, speed = pendulum
    return jnp.stack([jnp.cos(angle), jnp.sin(angle), speed / 8.0])


# Networks.


class Actor(nn.Module):
    """Observations to actions in [-1, 1]."""

    features: int

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """``[N, 3]`` or ``[3]``."""
        for _ in range(2):
            z = nn.relu(nn.Dense(self.features)(z))
        return nn.tanh(nn.Dense(1)(z))


class Critic(nn.Module):
    """Observations with actions to values; the norm is between a layer and its ReLU."""

    features: int
    estimator: cbn_jax.Estimator | None
    use_running_average: bool

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """``[N, 4]`` to ``[N]``."""
        for _ in range(2):
            z = nn.Dense(self.features)(z)
            if self.estimator is not None:
                z = Norm(self.estimator, use_running_average=self.use_running_average)(z)
            z = nn.relu(z)
        return nn.Dense(1)(z)[:, 0]


# Two critics with weights and statistics of their own, on axis 0. Without batch_stats in
# variable_axes they would share one state.
Critics = nn.vmap(
    Critic,
    in_axes=None,  # pyright: ignore[reportArgumentType]
    axis_size=2,
    variable_axes={"params": 0, "batch_stats": 0},
    split_rngs={"params": True},
)


def estimator_of(setup: Setup) -> cbn_jax.Estimator | None:
    """The normalizer.

    ``batch_renorm`` is plain batch norm for 5,000 batches by default, about as long as this
    run. Here the limits grow from 500 to 2,000 batches.
    """
    start = setup.warmup_steps
    known = {
        "batch_renorm": cbn_jax.batch_renorm(
            0.99, warmup_steps=start, r_steps=4 * start, d_steps=4 * start
        ),
        "batch_norm": cbn_jax.batch_norm(0.99),
        "none": None,
    }
    return known[setup.norm]


def critics_of(setup: Setup, *, train: bool) -> Critic:
    """The critics, for training or with running statistics."""
    return Critics(setup.features, estimator_of(setup), use_running_average=not train)


# The agent.


class Transitions(NamedTuple):
    """A batch, or all that was seen."""

    observation: jax.Array  # [N, 3]
    action: jax.Array  # [N, 1]
    reward: jax.Array  # [N]
    next_observation: jax.Array  # [N, 3]


class Agent(NamedTuple):
    """What learns. ``critics`` and ``target`` hold params and, with a norm, batch_stats."""

    actor: Any
    critics: Any
    target: Any
    actor_moments: Any
    critic_moments: Any
    updates: jax.Array


def pairs(observation: jax.Array, action: jax.Array) -> jax.Array:
    """What critics see, ``[N, 4]``."""
    return jnp.concatenate([observation, action], axis=-1)


def policy(actor: Any, observation: jax.Array, setup: Setup) -> jax.Array:
    """What the actor does, without noise."""
    action: Any = Actor(setup.features).apply(actor, observation)
    return action


def train_values(critics: Any, seen: jax.Array, setup: Setup) -> tuple[jax.Array, Any]:
    """Values with the batch's statistics, and what changes in ``critics``.

    In training mode alone ``batch_stats`` is mutable: it takes the batch in.
    """
    module = critics_of(setup, train=True)
    values, updates = module.apply(critics, seen, mutable=["batch_stats"])
    return values, updates


def infer_values(critics: Any, seen: jax.Array, setup: Setup) -> jax.Array:
    """Values with running statistics, whatever else is in the batch."""
    values: Any = critics_of(setup, train=False).apply(critics, seen)
    return values


def optimizer(setup: Setup) -> optax.GradientTransformation:
    """Adam with the short memory that CrossQ has."""
    return optax.adam(setup.learning_rate, b1=0.5)


def init_agent(key: jax.Array, setup: Setup) -> Agent:
    """Before the first update; the target starts as a copy."""
    keys = jax.random.split(key)
    actor = Actor(setup.features).init(keys[0], jnp.zeros((1, 3)))
    critics = critics_of(setup, train=False).init(keys[1], jnp.zeros((1, 4)))
    return Agent(
        actor,
        critics,
        jax.tree.map(jnp.copy, critics),  # a donated buffer may not be there twice
        optimizer(setup).init(actor),
        optimizer(setup).init(critics["params"]),
        jnp.zeros((), jnp.int32),
    )


def joint_values(
    critics: Any, target: Any, now: jax.Array, after: jax.Array, setup: Setup
) -> tuple[jax.Array, jax.Array, Any]:
    """Values of both halves of one batch, ``[2, N]`` each, without a target network.

    (s, a) and (s', a') have different distributions, since a' is today's policy and a is
    an older one. In one call both are normalized alike; in two calls each half would lose
    its own mean, and with it how the halves differ.
    """
    del target
    values, updates = train_values(critics, jnp.concatenate([now, after]), setup)
    values, next_values = jnp.split(values, 2, axis=1)
    return values, next_values, updates


def network_values(
    critics: Any, target: Any, now: jax.Array, after: jax.Array, setup: Setup
) -> tuple[jax.Array, jax.Array, Any]:
    """The same with a target network, which predicts with its running statistics."""
    values, updates = train_values(critics, now, setup)
    return values, infer_values(target, after, setup), updates


VALUES = {"joint": joint_values, "network": network_values}


def critic_loss(
    params: Any, agent: Agent, batch: Transitions, key: jax.Array, setup: Setup
) -> tuple[jax.Array, Any]:
    """Squared error of both critics, and the new ``batch_stats``."""
    noise = jnp.clip(0.2 * jax.random.normal(key, batch.action.shape), -0.5, 0.5)
    action = policy(agent.actor, batch.next_observation, setup) + noise
    values, next_values, updates = VALUES[setup.target](
        agent.critics | {"params": params},
        agent.target,
        pairs(batch.observation, batch.action),
        pairs(batch.next_observation, jnp.clip(action, -1.0, 1.0)),
        setup,
    )
    goal = setup.reward_scale * batch.reward + setup.discount * next_values.min(0)
    return jnp.square(values - lax.stop_gradient(goal)[None]).mean(), updates


def actor_loss(actor: Any, critics: Any, batch: Transitions, setup: Setup) -> jax.Array:
    """The negative value of the policy's actions.

    The critics predict here, so they use running statistics: a batch of the policy's
    actions alone has other moments than the batches of training, and must not enter
    batch_stats. Batch renorm makes both modes agree.
    """
    action = policy(actor, batch.observation, setup)
    values = infer_values(critics, pairs(batch.observation, action), setup)
    return -values.min(0).mean()


def update_critics(
    agent: Agent, batch: Transitions, key: jax.Array, setup: Setup
) -> tuple[Agent, jax.Array]:
    """One step of the critics, and of the target towards them."""
    params = agent.critics["params"]
    (loss, updates), gradients = jax.value_and_grad(critic_loss, has_aux=True)(
        params, agent, batch, key, setup
    )
    change, moments = optimizer(setup).update(gradients, agent.critic_moments)
    critics = {"params": optax.apply_updates(params, change), **updates}
    # batch_stats is averaged with the weights that it belongs to; all of it is float32.
    target = optax.incremental_update(critics, agent.target, setup.polyak)
    return agent._replace(critics=critics, target=target, critic_moments=moments), loss


def update_actor(agent: Agent, batch: Transitions, setup: Setup) -> Agent:
    """One step of the actor."""
    gradients = jax.grad(actor_loss)(agent.actor, agent.critics, batch, setup)
    change, moments = optimizer(setup).update(gradients, agent.actor_moments)
    actor = optax.apply_updates(agent.actor, change)
    return agent._replace(actor=actor, actor_moments=moments)


def update(
    agent: Agent, batch: Transitions, key: jax.Array, setup: Setup
) -> tuple[Agent, jax.Array]:
    """One step of the critics, and every few steps one of the actor."""
    agent, loss = update_critics(agent, batch, key, setup)
    agent = lax.cond(
        agent.updates % setup.actor_every == 0,
        lambda: update_actor(agent, batch, setup),
        lambda: agent,
    )
    return agent._replace(updates=agent.updates + 1), loss


# Acting and learning.


class Loop(NamedTuple):
    """All that a run carries from one step to the next."""

    agent: Agent
    pendulum: Pendulum
    seen: Transitions
    step: jax.Array
    key: jax.Array


def init_loop(seed: int, setup: Setup, steps: int) -> Loop:
    """Before the first step of a run of so many."""
    key, *keys = jax.random.split(jax.random.key(seed), 3)
    empty = [jnp.zeros((steps, *shape)) for shape in ((3,), (1,), (), (3,))]
    step = jnp.zeros((), jnp.int32)
    return Loop(init_agent(keys[0], setup), reset(keys[1]), Transitions(*empty), step, key)


def explore(loop: Loop, key: jax.Array, setup: Setup) -> jax.Array:
    """An action with noise; a random one at first."""
    noise, anything = jax.random.normal(key, (2, 1))
    chosen = policy(loop.agent.actor, observe(loop.pendulum), setup)
    action = jnp.where(
        loop.step < setup.random_steps, anything, chosen + setup.noise * noise
    )
    return jnp.clip(action, -1.0, 1.0)


def act(loop: Loop, key: jax.Array, setup: Setup) -> Loop:
    """One step of the pendulum, remembered."""
    keys = jax.random.split(key)
    action = explore(loop, keys[0], setup)
    after, reward = swing(loop.pendulum, action)
    new = Transitions(observe(loop.pendulum), action, reward, observe(after))
    seen = jax.tree.map(lambda old, x: old.at[loop.step].set(x), loop.seen, new)
    ended = (loop.step + 1) % EPISODE == 0
    after = jax.tree.map(lambda a, b: jnp.where(ended, a, b), reset(keys[1]), after)
    return loop._replace(pendulum=after, seen=seen, step=loop.step + 1)


def sample(loop: Loop, key: jax.Array, size: int) -> Transitions:
    """Transitions seen so far, each as likely as any."""
    index = jax.random.randint(key, (size,), 0, loop.step)
    return jax.tree.map(lambda leaf: leaf[index], loop.seen)


def learn(loop: Loop, key: jax.Array, setup: Setup) -> tuple[Loop, jax.Array]:
    """One update, or none while actions are random; and the loss."""
    keys = jax.random.split(key)

    def learned():
        return update(loop.agent, sample(loop, keys[0], setup.batch_size), keys[1], setup)

    agent, loss = lax.cond(
        loop.step > setup.random_steps, learned, lambda: (loop.agent, jnp.zeros(()))
    )
    return loop._replace(agent=agent), loss


@functools.partial(jax.jit, static_argnames=("setup", "steps"), donate_argnames="loop")
def advance(loop: Loop, setup: Setup, steps: int) -> tuple[Loop, jax.Array]:
    """So many steps, each with an update, and the losses; the old loop is overwritten."""

    def body(loop, _):
        key, *keys = jax.random.split(loop.key, 3)
        return learn(act(loop._replace(key=key), keys[0], setup), keys[1], setup)

    return lax.scan(body, loop, length=steps)


@functools.partial(jax.jit, static_argnames=("setup", "episodes"))
def evaluate(actor: Any, setup: Setup, episodes: int = 32) -> jax.Array:
    """Mean return of an episode without noise; always from the same starts."""

    def step(pendulum, _):
        return swing(pendulum, policy(actor, observe(pendulum), setup))

    def episode(key):
        return lax.scan(step, reset(key), length=EPISODE)[1].sum()

    return jax.vmap(episode)(jax.random.split(jax.random.key(0), episodes)).mean()


@functools.partial(jax.jit, static_argnames="setup")
def disagreement(loop: Loop, setup: Setup) -> jax.Array:
    """How far values in training and in inference are apart, in their own deviations.

    Root mean square over a batch, mean over the two critics.
    """
    agent, batch = loop.agent, sample(loop, jax.random.key(0), setup.batch_size)
    now = pairs(batch.observation, batch.action)
    action = policy(agent.actor, batch.next_observation, setup)
    after = pairs(batch.next_observation, action)
    train, _, _ = VALUES[setup.target](agent.critics, agent.target, now, after, setup)
    infer = infer_values(agent.critics, now, setup)
    return jnp.sqrt(jnp.square(train - infer).mean(1) / infer.var(1)).mean()


# The comparison.


@dataclasses.dataclass(frozen=True)
class Config:
    """Options: every target is run with every norm."""

    target: tuple[TargetName, ...] = ("joint", "network")
    """joint: no target network, one batch of both halves (CrossQ); network: a
    Polyak-averaged target network that predicts with its running statistics."""
    norm: tuple[NormName, ...] = ("batch_renorm", "batch_norm", "none")
    """Normalizers of the critics."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run each; a seed fixes weights, starts and exploration."""
    steps: int = 5_000
    """Of the pendulum; after the first 500 each comes with an update."""
    reports: int = 10
    """Evaluations on the way, 32 episodes each."""


class Row(NamedTuple):
    """One target and norm."""

    target: str
    norm: str
    curves: np.ndarray  # [seeds, reports], returns
    apart: float  # ``disagreement``
    loss: float  # of the critics, in the last part


def main(config: Config, console: Console) -> list[Row]:
    """Runs all and shows the table."""
    check(config)
    start = time.perf_counter()
    chosen = [Setup(*each) for each in itertools.product(config.target, config.norm)]
    with runs.Bar(console, len(chosen) * len(config.seeds) * config.steps) as bar:
        rows = [run(config, setup, bar) for setup in chosen]
    console.print(Markdown(table(rows)))
    console.print(Markdown(caption(config, time.perf_counter() - start)))
    return rows


def check(config: Config) -> None:
    """Options with which there is something to report."""
    if not (config.target and config.norm and config.seeds):
        raise ValueError("expected at least one of each: --target, --norm, --seeds.")
    if config.reports < 1 or config.steps < 1 or config.steps % config.reports:
        raise ValueError(
            f"--steps is {config.steps}, expected a multiple of --reports, which is "
            f"{config.reports}; both at least 1."
        )


def run(config: Config, setup: Setup, bar: runs.Bar) -> Row:
    """All seeds of one setup, side by side: XLA runs them at the same time."""
    loops = [init_loop(seed, setup, config.steps) for seed in config.seeds]
    part, curves, losses = config.steps // config.reports, [], []
    for _ in range(config.reports):
        loops, losses = zip(*(advance(loop, setup, part) for loop in loops), strict=True)
        curves.append([evaluate(loop.agent.actor, setup) for loop in loops])
        mean = np.mean(curves[-1])
        text = f"{setup.target} {setup.norm}: return {mean:.0f}"
        bar.advance(len(loops) * part, text)
    apart = np.mean([disagreement(loop, setup) for loop in loops])
    return Row(
        setup.target, setup.norm, np.array(curves).T, float(apart), float(np.mean(losses))
    )


HEADINGS = ("target", "norm", "return, whole run", "return, end", "training − inference")


def table(rows: list[Row]) -> str:
    """In Markdown; all rows, in the order of the options."""
    return report.markdown_table(
        HEADINGS,
        [
            (
                row.target,
                row.norm,
                report.mean_error(row.curves.mean(1), 0),
                report.mean_error(row.curves[:, -1], 0),
                f"{row.apart:.2f}",
            )
            for row in rows
        ],
    )


def caption(config: Config, seconds: float) -> str:
    """What the columns say, and where they were measured."""
    here = report.environment()
    return (
        f"Return of an episode of {EPISODE} steps, at most 0: mean ± standard error over "
        f"{len(config.seeds)} seeds, {config.steps} steps each. Whole run: mean of "
        f"{config.reports} evaluations. Training − inference: distance of values in "
        f"both modes, in their standard deviations. {seconds:.0f} seconds; "
        f"JAX {here['jax']}, Flax {here['flax']}, Python {here['python']}, "
        f"{here['device']}, {here['processor']}."
    )


def cli(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = tyro.cli(Config, args=arguments, description=__doc__, prog="off_policy")
    try:
        main(config, Console())
    except ValueError as error:
        sys.exit(f"off_policy: {error}")


if __name__ == "__main__":
    cli()
