"""The main job goes on from its checkpoints as if nothing had happened."""

import dataclasses
import json
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

from benchmarks import small_batch
from benchmarks.lib import checkpoints, data, methods, report, runs

pytestmark = [
    pytest.mark.studies,
    pytest.mark.usefixtures("loose"),
    # Raised inside tensorflow-datasets and what it imports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
EXAMPLES = 40


JOB = f"""
import os, signal, sys
from benchmarks import small_batch
from benchmarks.lib import checkpoints

data, *folders = sys.argv[1:]
for folder in folders:
    small_batch.cli(
        "--methods small_batch_norm --networks mlp --seeds 0 1 --epochs 2 "
        f"--timing-rounds 1 --examples {EXAMPLES} --data-dir {{data}} "
        f"--output {{folder}}/output "
        f"--checkpoint-dir {{folder}}/checkpoints".split()
    )
"""
# Each run is saved four times; the second one dies in the third.
KILLED = """
def save(self, step, *rest, usual=checkpoints.Checkpoints.save, steps=[]):
    steps.append(step)
    if len(steps) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    usual(self, step, *rest)

checkpoints.Checkpoints.save = save
"""


def call(script, *folders):
    """The exit code and the error output."""
    command = [sys.executable, "-c", script, *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True)
    return run.returncode, run.stderr


def bits(folder, start):
    """Of everything that was saved."""
    with checkpoints.Checkpoints(folder) as saved:
        state, curve = saved.restore(start)
    leaves = jax.tree.leaves_with_path(state)
    return [(path, leaf.dtype, np.asarray(leaf).tobytes()) for path, leaf in leaves], curve


def test_a_killed_run_ends_bit_for_bit_like_one_never_interrupted(tmp_path, data_dir):
    dataset = data.load("digits", data_dir, EXAMPLES)
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    killing = JOB.replace("\ndata,", f"{KILLED}\ndata,")
    assert call(killing, data_dir, killed)[0] == -signal.SIGKILL
    # Half of the steps: the third of four saves never came.
    saved = killed / "checkpoints/mlp-small_batch_norm-1"
    assert [path.name for path in saved.iterdir()] == [str(EXAMPLES // 2)]
    assert len(list((killed / "output/runs").iterdir())) == 1
    code, said = call(JOB, data_dir, killed, straight)
    assert code == 0, said
    curves = [
        json.loads((folder / "output/results.json").read_text())["cells"][0]["curves"]
        for folder in (killed, straight)
    ]
    assert curves[0] == curves[1]
    run = runs.Run("mlp", methods.parse("small_batch_norm", 2), 0.1, epochs=2, seed=1)
    start = run.trainer(dataset).init(jax.random.key(0))
    ends = [
        bits(folder / "checkpoints/mlp-small_batch_norm-1", start)
        for folder in (killed, straight)
    ]
    assert ends[0] == ends[1]
    assert len(ends[0][1]) == 20


def test_what_is_saved_is_not_trained_again(tmp_path, data_dir):
    """Nor are a run's steps before an interruption, nor those of a finished one."""
    dataset = data.load("digits", data_dir, EXAMPLES)
    run = runs.Run("mlp", methods.parse("batch_norm", 2), 0.1, epochs=2, seed=0)
    trainer, taken = run.trainer(dataset), []

    def step(*arguments):
        taken.append(1)
        return trainer.step(*arguments)

    def curve(output, advance=lambda *step: None):
        taken.clear()
        counting = trainer._replace(step=step)
        folders = tmp_path / output, tmp_path / "checkpoints"
        return runs.curve(run, counting, dataset, folders[0], advance, folders[1])

    def interrupt(steps, text):
        if len(taken) == 34:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curve("a", interrupt)
    resumed = curve("a")
    assert len(taken) == 40 - 30
    assert [point["step"] for point in resumed] == list(range(2, 42, 2))
    assert curve("b") == resumed
    assert not taken


OTHER = {
    "learning_rate": 0.2,
    "precision": "float32",
    "dataset": "digits:1.0.0",
    "batch_size": 4,
    "networks": ("cnn",),
    "methods": ("nn.GroupNorm",),
    "seeds": (1,),
    "epochs": 2,
    "examples": 32,
}


def test_a_folder_of_other_options_or_code_is_refused(tmp_path, data_dir, monkeypatch):
    config = small_batch.Config(
        methods=("batch_norm",),
        networks=("mlp",),
        seeds=(0,),
        epochs=1,
        examples=EXAMPLES,
        timing_rounds=1,
        precision="bfloat16",
        output=tmp_path / "output",
        data_dir=data_dir,
        checkpoint_dir=tmp_path / "checkpoints",
    )
    console = Console(width=80)
    first = small_batch.main(config, console)
    assert first["config"]["precision"] == "bfloat16"
    assert report.title(first).endswith("bfloat16")
    for name, value in OTHER.items():
        with pytest.raises(ValueError, match=f"holds runs with {name} .*, expected .* as"):
            small_batch.main(dataclasses.replace(config, **{name: value}), console)
    elsewhere = dataclasses.replace(config, output=tmp_path / "elsewhere", timing_rounds=2)
    again = small_batch.main(elsewhere, console)
    assert again["cells"][0]["curves"] == first["cells"][0]["curves"]
    monkeypatch.setattr(report, "source_digest", lambda: "other")
    with pytest.raises(ValueError, match=r"holds runs with source .*, expected other"):
        small_batch.main(config, console)
