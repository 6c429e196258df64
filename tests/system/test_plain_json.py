"""What is written as JSON can be read by any program that reads JSON."""

import json
import math

import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.measuring import recorded
from engine.report.history import read_sessions
from engine.run.records import append_record, keep_records_up_to, read_records
from engine.system.plain_json import from_json, to_json


def strictly(text):
    """Parse JSON as the standard has it, without Infinity and NaN."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text().filter(lambda t: "inf" not in t)


@given(st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10))
def test_what_is_written_is_json_and_is_read_back_as_it_was(value):
    strictly(to_json(value))
    assert from_json(to_json(value)) == value


def test_what_is_no_number_becomes_null():
    assert to_json({"loss": math.nan, "of": [math.nan, (1.0, -math.inf)]}) == '{"loss": null, "of": [null, [1.0, "-inf"]]}'


def test_records_hold_what_the_standard_knows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_record(path, {"epoch": 1, "val_loss": math.inf, "more_val": [{"raw": {"loss": math.nan}}]})
    path.write_text(path.read_text() + '{"epoch": 2, "val_loss": Infinity}\n')  # as it was written before
    keep_records_up_to(path, 2)
    for line in path.read_text().splitlines():
        strictly(line)
    assert [record["val_loss"] for record in read_records(path)] == [math.inf, math.inf]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "benchmarks").glob("*.jsonl")), ids=lambda path: path.stem)
def test_recorded_benchmarks_hold_what_the_standard_knows(path):
    for line in path.read_text().splitlines():
        strictly(line)
    if path.stem == "recipes":
        assert any(run["config"].get("grad_clip_value") == math.inf for run in recorded("recipes"))


LOG = """2026-01-01T00:00:00+0000 environment: {"cores": 2}
2026-01-01T00:00:00+0000 configuration: {"learning_rate": "auto", "grad_clip_value": Infinity, "checkpoint_dir": "inf"}
2026-01-01T00:00:01+0000 suggested learning_rate: 0.0031 (the loss falls fastest there; steepest descent 0.0031)
"""


def test_logs_of_old_can_be_read(tmp_path):
    (tmp_path / "log").write_text(LOG)
    (session,) = read_sessions(tmp_path / "log")
    assert session.config["grad_clip_value"] == math.inf
    assert (session.asked_config["learning_rate"], session.config["learning_rate"]) == ("auto", 0.0031)


def test_nesting_too_deep_to_be_read_is_no_json(tmp_path):
    text = "[" * 100_000 + "]" * 100_000
    with pytest.raises(ValueError, match="too deep"):
        from_json(text)
    (tmp_path / "metrics.jsonl").write_text(f'{text}\n{{"epoch": 1}}\n')
    assert read_records(tmp_path / "metrics.jsonl") == [{"epoch": 1}]
