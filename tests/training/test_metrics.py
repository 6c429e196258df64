import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.inference.scoring import topk_correct
from engine.run.records import append_record, keep_records_up_to, read_records
from engine.training.metrics import MetricAccumulator


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 6), st.integers(0, 10_000))
def test_topk_correct_counts_as_sorting_by_hand_does(images, classes, k, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    by_hand = sum(
        label in sorted(range(classes), key=row.__getitem__)[-k:]
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    )
    assert topk_correct(logits, labels, k).item() == by_hand


def step(loss, correct=3.0, grad_norm=2.0):
    return torch.tensor(loss), torch.tensor(correct), torch.tensor(grad_norm), 4


def test_sums_give_the_means_over_the_images():
    sums = MetricAccumulator(torch.device("cpu"))
    sums.add(*step(1.0, correct=1.0, grad_norm=1.0))
    sums.add(*step(3.0, correct=3.0, grad_norm=2.0))
    figures = sums.read()
    assert (figures.loss, figures.top1, figures.grad_norm, figures.images) == (2.0, 50.0, 1.5, 8)
    assert figures.skipped_steps == 0


def test_steps_that_are_not_finite_are_counted_and_kept_out_of_the_means():
    sums = MetricAccumulator(torch.device("cpu"))
    for loss, norm in ((1.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan), (2.0, 1.0), (1.0, math.nan)):
        sums.add(*step(loss, grad_norm=norm))
    figures = sums.read()
    assert (figures.skipped_steps, figures.longest_skipped_row, figures.skipped_in_a_row) == (4, 3, 1)
    assert (figures.loss, figures.grad_norm, figures.top1) == (1.5, 1.0, 75.0)
    assert figures.images == 24


def test_records_survive_a_line_cut_short_by_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_records(path) == []
    for epoch in (1, 2, 3):
        append_record(path, {"epoch": epoch, "val_top1": 10.0 * epoch})
    with path.open("ab") as file:
        file.write(b'{"epoch": 4, "val_t\xff')
    assert [record["epoch"] for record in read_records(path)] == [1, 2, 3]


def test_a_resumed_run_leaves_no_double_and_no_missing_epoch_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for epoch in (1, 2, 3):
        append_record(path, {"epoch": epoch})
    keep_records_up_to(path, 2)
    append_record(path, {"epoch": 3, "again": True})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"epoch": 1},
        {"epoch": 2},
        {"epoch": 3, "again": True},
    ]


def test_sums_are_all_in_values():
    first, second = MetricAccumulator(torch.device("cpu")), MetricAccumulator(torch.device("cpu"))
    first.add(*step(1.25))
    first.add(*step(math.nan))
    second.values.copy_(first.values)
    assert second.read() == pytest.approx(first.read())


def test_a_row_of_skipped_steps_goes_on_across_epochs():
    sums = MetricAccumulator(torch.device("cpu"))
    for _ in range(3):
        sums.add(*step(math.nan))
    sums.reset()
    assert sums.read().skipped_steps == 0
    sums.add(*step(math.nan))
    assert (sums.read().skipped_in_a_row, sums.read().longest_skipped_row, sums.read().skipped_steps) == (4, 4, 1)
    sums.add(*step(1.0))
    sums.reset()
    assert sums.read().longest_skipped_row == 0


def test_dropping_records_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    for epoch in (1, 2, 3):
        append_record(path, {"epoch": epoch})

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("engine.system.files.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        keep_records_up_to(path, 2)
    assert [record["epoch"] for record in read_records(path)] == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
