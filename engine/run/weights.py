"""The kinds of weights that a run may have: where a checkpoint keeps them, their columns in the records, their names."""

from typing import NamedTuple


class Weights(NamedTuple):
    checkpoint_key: str
    column: str  # what the keys of their figures in metrics.jsonl begin with
    in_words: str


WEIGHTS = {  # of equally good ones the first is the best
    "raw": Weights("model", "val", "raw weights"),
    "averaged": Weights("averaged_model", "averaged_val", "averaged weights"),
    "ema": Weights("ema_model", "ema_val", "running average"),
}
