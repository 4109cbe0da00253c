# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of runs, from which a killed job resumes with the same result."""

import json
from pathlib import Path
from typing import Any

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import orbax.checkpoint as ocp

from benchmarks.lib import report


def claim(folder: Path, options: dict) -> None:
    """Records the options and code of a folder, and refuses a folder with other ones."""
    path = folder / "options.json"
    asked = {**options, **report.environment(), "source": report.source_digest()}
    asked = json.loads(json.dumps(asked))  # tuples as JSON holds them
    if not path.exists():
        return report.write_json(path, asked)
    holds = json.loads(path.read_text())
    for name in (name for name in asked if asked[name] != holds.get(name)):
        raise ValueError(
            f"--checkpoint-dir {folder} holds runs with {name} {holds.get(name)}, expected "
            f"{asked[name]} as in this call; ask for what it holds, or name another folder."
        )


class Checkpoints:
    """The newest state of one run and its curve so far, in a folder of its own.

    The order of the examples and all random numbers are functions of the seed and the step.
    State and curve therefore determine the whole run.
    """

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(1),
            enable_async_checkpointing=False,  # the next step donates the state
            cleanup_tmp_directories=True,  # from a kill during a save
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()

    def save(self, step: int, state: Any, curve: list) -> None:
        """Saves atomically: after a kill the previous checkpoint remains."""
        items = {
            "state": ocp.args.StandardSave(state),
            "curve": ocp.args.JsonSave({"points": curve}),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, start: Any) -> tuple[Any, list]:
        """State and curve; those of the start if nothing is saved."""
        if self._manager.latest_step() is None:
            return start, []
        items = {"state": ocp.args.StandardRestore(start), "curve": ocp.args.JsonRestore()}
        found = self._manager.restore(None, args=ocp.args.Composite(**items))
        return found["state"], found["curve"]["points"]
