"""A run's budget: made once, with the plan of a new run, kept in its ledger, and gone on with by every later session."""

from engine.cli.keys import ConfigError
from engine.run.ledger import read_hours
from engine.system.wording import duration
from engine.training.mirroring import ledgers_there, require_same_run
from engine.training.plan import BUDGETS, PlanError, budget_flag, budget_hours, positive


def open_ledger(ledger, command, source, beginning, folder, mirror):
    """Let a session's Ledger be that of the run that it begins or goes on with; return lines on the budget.

    Args:
        source: as source_of_run returns it; 'auto' also where torchrun starts a new run again.
        beginning: the run's Beginning.
        folder: the run's, where hours.json may know more of its sessions than the checkpoint.
        mirror: Mirror, which may know more, too; or None.
    Raises:
        CheckpointError: the mirror holds another run, or a later state of this one than was asked for.
        ConfigError: a budget is given to a run that was begun without one.
    """
    options, checkpoint = command.options, beginning.checkpoint
    known = [other for other in (*ledgers_there(mirror), read_hours(folder)) if other]
    if checkpoint is not None:
        ledger.take_over(checkpoint.get("ledger"))  # absent in a checkpoint of old
    elif source == "auto" and known:  # killed before the first save
        ledger.run = known[-1]["run"]
    for other in known:
        ledger.merge(other)
    if checkpoint is not None:
        require_same_run(mirror, ledger, source, checkpoint["path"])
    return _settle_budget(options, ledger, checkpoint)


def _settle_budget(options, ledger, checkpoint):
    """Let the ledger's budget be the one that holds, and return lines on it."""
    hours, before = budget_hours(options), ledger.budget
    if checkpoint is not None and hours is not None and before is None:
        begun = f"{checkpoint['path']} was begun without a budget"
        raise ConfigError([f"--{budget_flag(options)}: {begun}, and a plan is made for a new run; change --epochs"])
    if hours is not None:
        ledger.budget = {"hours": hours, "dollars": positive("dollars", options)}
    if ledger.budget is None or not ledger.earlier_sessions:
        return []
    remarks = []
    if before not in (None, ledger.budget):
        remarks.append(f"the budget was {in_words(before)}, now it is {in_words(ledger.budget)}; the epochs stay as planned")
    cost = f", {ledger.dollars():.2f} dollars" if ledger.dollars() else ""
    remarks.append(f"budget: {in_words(ledger.budget)}; {duration(ledger.hours())}{cost} used so far, with {_sessions(ledger)}")
    return remarks


def for_what_is_left(command, ledger):
    """Return the Command of a new run with what earlier sessions, all killed before the first save, have left of its budget.

    Raises:
        PlanError: they have left nothing.
    """
    for name, used in zip(BUDGETS, ledger.used_before(), strict=True):
        if name in command.options and used:
            given = positive(name, command.options)
            if used >= given:
                raise PlanError(
                    f"--{name} {given:g}: {used:.2f} {name} are used by {_sessions(ledger)}, killed before the first save: "
                    "allow more, or start anew with --overwrite in place of --resume"
                )
            command = command._replace(options=command.options | {name: repr(given - used)})
    return command


def _sessions(ledger):
    return f"{ledger.earlier_sessions} earlier session" + ("s" if ledger.earlier_sessions > 1 else "")


def in_words(budget):
    """Return a budget as text."""
    hours = duration(budget["hours"])
    return f"{budget['dollars']:g} dollars ({hours})" if budget["dollars"] else hours
