"""metrics.jsonl: one JSON object for each finished epoch of a run."""

from pathlib import Path

from engine.system.files import append_whole, replacing
from engine.system.plain_json import from_json, to_json


def append_record(path, record):
    """Append the record as one line and have it on disk before returning; nothing of it is left where that fails."""
    append_whole(path, to_json(record).encode() + b"\n", synced=True)


def read_records(path):
    """Return the records of metrics.jsonl; a line cut short by a kill is passed over."""
    return _read_lines(path)[0]


def _read_lines(path):
    """Return (records, number of lines that hold none)."""
    if not Path(path).exists():
        return [], 0
    records, unreadable = [], 0
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = from_json(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("epoch"), int):
            records.append(record)
        else:
            unreadable += 1
    return records, unreadable


def keep_records_up_to(path, epochs):
    """Drop the records of epochs after `epochs`: a run resumed from there will write them again.

    Returns:
        the number of lines that could not be read, and are dropped as well.
    """
    records, unreadable = _read_lines(path)
    kept = {record["epoch"]: record for record in records if record["epoch"] <= epochs}
    with replacing(path, "w") as file:
        file.writelines(to_json(kept[epoch]) + "\n" for epoch in sorted(kept))
    return unreadable
