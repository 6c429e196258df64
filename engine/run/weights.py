"""The kinds of weights that a run has, and what each is called in checkpoints, records and messages."""

from typing import NamedTuple


class Weights(NamedTuple):
    """One kind of weights."""

    checkpoint_key: str  # of its state dict in a checkpoint
    column: str  # how the names of its columns in metrics.jsonl begin
    in_words: str
    label: str  # in a line that has little room


WEIGHTS = {
    "raw": Weights("model", "val", "raw weights", "raw"),
    "averaged": Weights("averaged_model", "averaged_val", "averaged weights", "averaged"),
    "ema": Weights("ema_model", "ema_val", "running average", "EMA"),
}
PREFERENCE = ("averaged", "ema", "raw")  # the first of them that a run has stands for it, where no score decides
