"""One of several processes that train together: a few steps, and what came of them.

``python -m tests.worker OUTPUT DEVICES ADDRESS PROCESSES INDEX``
"""

import sys

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import cbn_jax as cbn
from benchmarks.studies import data_parallel
from benchmarks.studies.data_parallel import Network

STEPS, EXAMPLES = 3, 16
WAYS = {
    "sharded jit": data_parallel.sharded_jit_step,
    "shard_map": data_parallel.shard_map_step,
}


def train(way):
    """State and losses by name; a process hands over its own rows of a batch only."""
    mesh = data_parallel.make_mesh(jax.device_count())
    estimator = cbn.streaming_batch_norm(window=3, samples=None)
    model = Network(estimator, classes=3, features=(4,))
    optimizer = optax.sgd(0.1, momentum=0.9)
    rng = np.random.default_rng(0)
    images = rng.random((STEPS, EXAMPLES, 6, 6, 1), np.float32)
    labels = rng.integers(0, 3, (STEPS, EXAMPLES), np.int32)

    def spread(leaf, spec):
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), leaf)

    start = data_parallel.init(model, optimizer, images[0], seed=0)
    state = jax.tree.map(lambda leaf: spread(leaf, P()), start)
    if way == "shard_map":
        model = model.clone(axis_name="data")
    step, losses = WAYS[way](model, optimizer, mesh), []
    for batch in zip(images, labels, strict=True):
        own = (np.split(b, jax.process_count())[jax.process_index()] for b in batch)
        state, loss = step(state, *(spread(part, P("data")) for part in own))
        losses.append(loss)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get((state, losses)))
    return {way + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def main(output, devices, address, processes, index):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address, int(processes), int(index), initialization_timeout=60
    )
    assert jax.device_count() == int(devices) * int(processes)
    np.savez(output, **{name: leaf for way in WAYS for name, leaf in train(way).items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
