"""What happened to a run, from its events.jsonl: Sessions, as engine/report/history.py reads them from the log of old runs."""

import contextlib
from datetime import datetime

from engine.report.history import FINISHED_END, SILENT_END, Session
from engine.run.events import read_events


def sessions_of_events(path):
    """Return the Sessions of a run, oldest first; an event that is not as a run writes it is passed over."""
    sessions = []
    for event in read_events(path):
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            instant = datetime.fromtimestamp(event["time"]).astimezone()
            if event["event"] == "start":
                sessions.append(_begun(event, instant))
            elif sessions:
                sessions[-1] = _with_event(sessions[-1], event, instant)
    return sessions


def _begun(event, instant):
    config = {**event["config"]}
    return Session(
        begun=instant,
        last_word=instant,
        first_position=(0, 0),
        last_position=(0, 0),
        ended=SILENT_END,
        recipe=str(event["recipe"]),
        images=int(event["images"]),
        classes=int(event["classes"]),
        steps_per_epoch=int(event["steps_per_epoch"]),
        hardware=event["hardware"],
        environment={**event["environment"]},
        config=config,
        asked_config=config,
        warnings=[],
        verdicts=[] if event.get("judged") else None,
    )


def _with_event(session, event, instant):
    """Return the session as one more event tells it."""
    kind, session = event["event"], session._replace(last_word=instant)
    if "epoch" in event and "batch" in event:
        session = session._replace(last_position=(event["epoch"], event["batch"]))
    if kind == "resume":
        return session._replace(first_position=session.last_position)
    if kind == "configuration":
        return session._replace(config={**event["config"]})
    if kind == "warning":
        return session._replace(warnings=[*session.warnings, event["text"]])
    if kind == "verdict":
        return session._replace(verdicts=[*(session.verdicts or []), event])
    if kind == "interruption":
        saved = "saved" if event["saved"] else "NOT saved"
        return session._replace(ended=f"stopped by {event['reason']}, {saved}")
    if kind == "error":
        return session._replace(ended=f"stopped: {event['reason']}")
    return session._replace(ended=FINISHED_END) if kind == "end" else session
