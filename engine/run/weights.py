"""The kinds of weights that a run has, and what each is called in checkpoints, records and messages."""

from typing import NamedTuple


class Weights(NamedTuple):
    """One kind of weights."""

    checkpoint_key: str  # of its state dict in a checkpoint
    column: str  # how the names of its columns in metrics.jsonl begin
    in_words: str


WEIGHTS = {
    "raw": Weights("model", "val", "raw weights"),
    "averaged": Weights("averaged_model", "averaged_val", "averaged weights"),
    "ema": Weights("ema_model", "ema_val", "running average"),
}
PREFERENCE = ("averaged", "ema", "raw")  # the first of them that a run has stands for it, where no score decides
