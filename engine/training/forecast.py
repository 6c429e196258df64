"""When a run will end and what it will cost, from how long this session took for its part of the work."""

import time
from typing import NamedTuple

from engine.cli.keys import ConfigError
from engine.cli.resume_rule import resumed_config
from engine.data.batches import resolution_of_epoch
from engine.system.micro_batches import network_px
from engine.system.wording import duration
from engine.training import averaging
from engine.training.plan import Rates, passes_of_a_step, rates_stated, validation_seconds

SETTLED_SECONDS = 300.0  # of a session, after which its speed is trusted, if no epoch has ended before
TOLERANCE = 0.02  # share of the budget that is nothing to speak of


class Outlook(NamedTuple):
    """What the rest of a run will take at this session's speed."""

    hours_left: float
    hours: float  # of the whole run, all its sessions together
    dollars_so_far: float | None  # None without a price
    dollars: float | None

    @property
    def end(self):
        return time.localtime(time.time() + 3600 * self.hours_left)

    def as_figures(self):
        """Return {name: text} for the bar."""
        figures = {"ends": time.strftime("%Y-%m-%d %H:%M", self.end)}
        return figures | ({"dollars": f"{self.dollars_so_far:.2f} of {self.dollars:.2f}"} if self.dollars else {})


def work_of_epochs(config, counts, rates):
    """Return [(training, afterwards)] of a run's epochs: seconds at these Rates.

    Args:
        counts: of the images for training and for validation.
    """
    work, images = [], counts[0] // config["batch_size"] * config["batch_size"]
    at_largest = rates.training_at(network_px(config, config["train_resolution"])) / passes_of_a_step(config)
    for epoch in range(config["epochs"]):
        rate = rates.training_at(network_px(config, resolution_of_epoch(config, epoch))) / passes_of_a_step(config)
        afterwards = validation_seconds(config, rates, epoch + 1, counts) + rates.passes_seconds + rates.save_seconds
        if averaging.epochs_to_average(config, epoch + 1):
            batches = min(config["swa_batch_norm_batches"] * config["batch_size"], images)
            statistics = rates.statistics or 3 * at_largest  # 0: not measured; a forward pass is a third of a step
            afterwards += batches / (statistics * rate / at_largest)
        work.append((images / rate, afterwards))
    return work


class Forecast:
    """Says how a run will go on, and whether it keeps to the budget in its ledger.

    Args:
        config: of the run.
        counts: of the images for training and for validation.
        ledger: Ledger.
        clock: time.perf_counter, or another one.
    """

    def __init__(self, config, counts, ledger, clock=time.perf_counter):
        self._config, self._counts, self._ledger, self._clock = config, counts, ledger, clock
        self._steps_per_epoch = counts[0] // config["batch_size"]
        # How long its parts are beside each other: as measured for the plan; where there is none, by pixels and passes.
        self._rates = Rates.from_plain(ledger.rates) if ledger.rates else rates_stated(1000.0, config)
        self._work = work_of_epochs(config, counts, self._rates)
        self._start = None  # (epoch, work done, instant)
        self._said = TOLERANCE

    def note(self, epoch, batch):
        """Count from here if this is the session's first batch."""
        if self._start is None:
            self._start = epoch, self._done(epoch, batch), self._clock()

    def _done(self, epoch, batch):
        before = sum(training + afterwards for training, afterwards in self._work[:epoch])
        in_progress = self._work[epoch][0] * batch / self._steps_per_epoch if batch else 0.0
        return before + in_progress

    def _seconds_per_work(self, epoch, batch):
        if self._start is None:
            return None
        done, seconds = self._done(epoch, batch) - self._start[1], self._clock() - self._start[2]
        return seconds / done if done > 0 and seconds > 0 else None

    def outlook(self, epoch, batch):
        """Return the Outlook after so many epochs and batches of the next one, or None while nothing is known."""
        pace = self._seconds_per_work(epoch, batch)
        if pace is None:
            return None
        left = pace * (sum(map(sum, self._work)) - self._done(epoch, batch)) / 3600
        price, so_far = self._ledger.price_per_hour, None
        if price is not None:
            so_far = self._ledger.dollars()
        return Outlook(left, self._ledger.hours() + left, so_far, so_far + left * price if price is not None else None)

    def in_words(self, epoch):
        """Return how the run will go on after so many epochs, for the epoch's line; '' while nothing is known."""
        outlook = self.outlook(epoch, 0)
        if outlook is None:
            return ""
        if epoch == self._config["epochs"]:
            return f"; {duration(outlook.hours)} in all" + (f", {outlook.dollars:.2f} dollars" if outlook.dollars else "")
        figures = outlook.as_figures()
        return f"; ends {figures['ends']}" + (f", {figures['dollars']} dollars" if "dollars" in figures else "")

    def warning(self, epoch, batch):
        """Return a line if the run will miss its budget, and if that has not been said, or is getting worse; else None."""
        budget, outlook = self._ledger.budget, self.outlook(epoch, batch)
        if budget is None or outlook is None or epoch == self._config["epochs"]:
            return None
        if epoch == self._start[0] and self._clock() - self._start[2] < SETTLED_SECONDS:
            return None
        if in_dollars := bool(budget["dollars"]) and outlook.dollars is not None:
            over, limit = outlook.dollars - budget["dollars"], budget["dollars"]
            text = f"{outlook.dollars:.2f} dollars in all, {over:.2f} ({over / limit:.0%}) more than its budget of {limit:g}"
        else:
            over, limit = outlook.hours - budget["hours"], budget["hours"]
            text = f"{duration(outlook.hours)} in all, {duration(over)} ({over / limit:.0%}) more than its budget of"
            text += f" {duration(limit)}"
        if over / limit <= self._said:
            return None
        self._said = over / limit + 0.05
        hours_left = outlook.hours_left - (over / self._ledger.price_per_hour if in_dollars else over)
        return f"WARNING: at this speed the run takes {text}; {self._what_fits(epoch, batch, hours_left)}"

    def _what_fits(self, epoch, batch, hours):
        """Return, in words, the most epochs of which the rest fits into so many hours and that the configuration admits."""
        seconds, most = self._seconds_per_work(epoch, batch), None
        for epochs in range(self._config["epochs"] - 1, epoch, -1):
            work = work_of_epochs(self._config | {"epochs": epochs}, self._counts, self._rates)
            left = sum(map(sum, work[epoch:])) - work[epoch][0] * batch / self._steps_per_epoch
            if left * seconds / 3600 <= hours:
                try:
                    resumed_config(self._config, {"epochs": epochs}, batch, epoch)
                except ConfigError as error:
                    most = most or f"{epochs} epochs would fit, but {error.problems[0]}"
                    continue
                budget = "--dollars" if self._ledger.budget["dollars"] else "--hours"
                return f"{epochs} epochs would fit: stop it and go on with --epochs {epochs} in place of {budget}"
        return most or "not even the epoch in progress fits"
