"""Which model RL keeps, and when it stops: held-out evaluations on fixed seeds, the best model so far, alarms.

metrics.jsonl                      the numbers of `marval.monitor.Monitor` at every evaluation, and which raise an alarm
config.json, model.safetensors     the averaged model with the best score so far, loadable at any time

What `marval.curve` is to the other two loops.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from marval.config import RLConfig, warn
from marval.models.mar import MAR
from marval.monitor import Monitor
from marval.pipeline import Pipeline
from marval.rewards import WeightedSum
from marval.run import Run
from marval.scoring import RewardError, during

COLLAPSES = 3
"""Evaluations of a collapsed model in a row that stop a run, however patient it is."""


class Selection:
    """Measures a model every so many updates, knows the best so far that has not collapsed, and when to stop.

    Attributes:
        state: what is saved with the run: ``score``, ``step`` and trained ``weights`` of the best evaluation, the
            ``misses`` since, how often in a row the model has ``collapsed``, why to ``stop``; the ``ranges`` of the
            starting student, and the ``units`` (means, deviations) of a weighted sum's parts.
    """

    def __init__(self, config: RLConfig, monitor: Monitor):
        self.config, self.monitor, self.reward = config, monitor, monitor.rewards["reward"]
        self.state: dict[str, Any] = {"score": -float("inf"), "step": 0, "misses": 0, "collapsed": 0, "weights": None}
        self.state |= {"ranges": {}, "stop": "", "units": None}
        if isinstance(self.reward, WeightedSum):
            self.state["units"] = [self.reward.means, self.reward.stds]

    def begin(self) -> None:
        """Give a weighted sum the units that the run began with; to be called once the run restored `state`."""
        if isinstance(self.reward, WeightedSum):
            self.reward.means, self.reward.stds = self.state["units"]
        if not self.monitor.independent:
            what = "nothing is watched that the reward does not optimise: hacking shows in image statistics alone"
            warn(f"{what}; add --held-out, --judge or --features that ask another network")

    def measure(self, model: Pipeline, step: int, run: Run) -> bool:
        """Measure the averaged model after ``step`` updates, on all processes; returns whether it is the best so far.

        The best has its number in its provenance, and is the caller's to save.

        Raises:
            RewardError: of a reward that fails.
        """
        monitor, state = self.monitor, self.state
        with during(f"evaluation of update {step}"):
            values = monitor.measure(model)
            if step == 0:
                state["ranges"] = monitor.ranges(model, values)
        ranges = state["ranges"]
        alarms = monitor.alarms(values, ranges)
        for name in alarms if monitor.world.is_main else ():
            tqdm.write(monitor.line(step, name, values[name], ranges), file=sys.stderr)
        stated = monitor.stated(ranges) if step == 0 else {}
        run.log(step, **values, alarms=len(alarms), **{f"alarm_{name}": far for name, far in alarms.items()}, **stated)

        score, collapsed = monitor.criterion(values), monitor.collapsed(alarms, values, ranges)
        better = score > state["score"] and not collapsed
        if better:
            weights = {name: x.cpu().clone() for name, x in self._trained_part(model.network).state_dict().items()}
            state.update(score=score, step=step, misses=0, weights=weights)
            model.provenance["best_update"] = step
        else:
            state["misses"] += 1
        state["collapsed"] = state["collapsed"] + 1 if collapsed else 0
        state["stop"] = self._reason_to_stop(step, values["reward_heldout"], collapsed)
        return better

    def _reason_to_stop(self, step: int, reward: float, collapsed: str) -> str:
        """Why the run ends after this evaluation; empty if it goes on."""
        target, patience, state = self.config.target, self.config.patience, self.state
        if step > 0 and target is not None and reward >= target and not collapsed:
            return f"held-out reward {reward:.4g} has reached the target {target:g}; best is update {state['step']}"
        if 0 < min(patience, COLLAPSES) <= state["collapsed"]:
            return f"collapsed: {collapsed}; best is update {state['step']}"
        if 0 < patience <= state["misses"]:
            return f"no better held-out score since update {state['step']}"
        return ""

    def best_of(self, model: Pipeline) -> Pipeline:
        """The averaged model with the weights of the best evaluation in place of its own."""
        self._trained_part(model.network).load_state_dict(self.state["weights"])
        model.provenance["best_update"] = self.state["step"]
        return model

    def _trained_part(self, network: MAR) -> nn.Module:
        """The part of an averaged model that differs from the starting student: its head, or all of it."""
        return network.head if self.config.trained == "head" else network

    @contextlib.contextmanager
    def telling_where(self, out: Path) -> Iterator[None]:
        """Say in an error of the reward or of an update where the best model so far lies."""
        try:
            yield
        except (RewardError, FloatingPointError) as error:
            if self.state["weights"] is None:
                raise
            where = f"the best model so far, of update {self.state['step']}, is in {out}"
            raise type(error)(f"{error}; {where}") from error
