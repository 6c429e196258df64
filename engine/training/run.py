"""An open run: what training works with, and what it leaves behind."""

from dataclasses import dataclass
from pathlib import Path

import torch

from config import CONFIG
from engine.data.batches import training_requests
from engine.data.loader import BatchLoader
from engine.data.splits import label_digests
from engine.inference.weight_files import FoundWeights, load_weights
from engine.preparation.val_share import share_digests
from engine.report.figures import read_run
from engine.report.one_run import report_of_run
from engine.report.writing import REPORT, write_report
from engine.run.checkpoint_folder import CheckpointFolder
from engine.run.ledger import Ledger
from engine.run.mirror import Mirror
from engine.run.monitor import Monitor
from engine.system import distributed
from engine.system.device import describe_device
from engine.system.errors import TrainingStopped
from engine.system.interruption import StopRequest
from engine.system.lock import FolderLock
from engine.training.class_balance import class_weights, weights_in_words
from engine.training.forecast import Forecast
from engine.training.state import TrainState
from engine.training.validation import epoch_record, note_best


@dataclass
class Run:
    """What open_run has opened. The configuration is final."""

    config: dict
    recipe: str
    checkpoint: dict | None  # to go on from, until restore() has taken it over
    initial: FoundWeights | None  # to begin with, likewise
    compile_choice: dict
    device: torch.device
    precision: str
    batches: BatchLoader
    monitor: Monitor
    lock: FolderLock
    stop: StopRequest
    ledger: Ledger
    mirror: Mirror | None
    state: TrainState | None = None  # once restore() has been called: what an interruption saves
    checkpoints: CheckpointFolder | None = None

    @property
    def num_classes(self):
        return len(self.batches.splits["train"].classes)

    @property
    def steps_per_epoch(self):
        return len(self.batches.splits["train"]) // self.config["batch_size"]

    def restore(self, state):
        """Let a new TrainState be the run's, at the checkpoint to go on from or at the start; files of the run are opened."""
        checkpoint, resumed, images = self.checkpoint, None, self.batches.splits["train"]
        state.class_weights = class_weights(self.config, images, self.device)
        if state.class_weights is not None:
            self.monitor.log(weights_in_words(state.class_weights, images))
        if checkpoint is not None:
            state.load_state_dict(checkpoint, self.config, self.steps_per_epoch)
            resumed, self.checkpoint = (checkpoint["best"], checkpoint["path"]), None  # hundreds of megabytes
            self.monitor.event("resume", epoch=state.epoch, batch=state.batch, checkpoint=resumed[1], best=dict(state.best))
        elif self.initial is not None:
            for line in load_weights(state.model, self.initial, images.classes):
                self.monitor.log(line)
            self.initial = None
        log, event = self.monitor.log, self.monitor.event
        self.checkpoints = CheckpointFolder(
            self.config, self.facts(), self.lock, self.stop, log, event, self.ledger, self.mirror
        )
        counts = len(self.batches.splits["train"]), len(self.batches.splits["val"])
        self.monitor.forecast = Forecast(self.config, counts, self.ledger)
        if resumed:
            self.checkpoints.find_best(*resumed)
            self.checkpoints.mirror_what_is_there(state)
        came_from = Path(resumed[1]).parent if resumed else None
        self.monitor.open_records(self.config, self.checkpoints.folder, state.epoch, came_from)
        self.state = state

    def facts(self):
        """Return what each checkpoint says of the run besides its state."""
        train, val = self.batches.splits["train"], self.batches.splits["val"]
        several = f"{distributed.size()} times " if distributed.size() > 1 else ""
        return {
            "config": self.config,
            "recipe": self.recipe,
            "classes": train.classes,
            "train_images": len(train),
            "val_images": len(val),
            "share_digests": share_digests(self.batches.splits),  # of a run with val_share
            "label_digests": label_digests(self.batches.splits),
            "compile_choice": self.compile_choice,
            "hardware": several + describe_device(self.device),
            "class_names": getattr(train, "class_names", {}),  # what people call them, where a packed file knows
        }

    def training_batches(self, state):
        """Return an iterator of (images, labels) over the rest of the epoch in progress; the monitor shows its progress."""
        images = self.batches.splits["train"]
        self.monitor.start(f"epoch {state.epoch + 1}/{self.config['epochs']}", self.steps_per_epoch, state.batch, state.epoch)
        requests = training_requests(images, self.config, state.epoch, state.batch)
        return self.monitor.observe(self.batches.training(requests, state.bad_images))

    def record(self, state, trained, scores):
        """Write the epoch's record, let its best weights be the run's if they are, and return the record."""
        note_best(state, scores.at_val_resolution, self.checkpoints.best)
        return self.monitor.write_record(epoch_record(state, self.config, trained, scores))

    def finish(self, state):
        """Log where the best weights are.

        Raises:
            TrainingStopped: the last state is not on disk and could not be saved now.
        """
        folder = self.checkpoints.folder
        if not (self.checkpoints.is_saved or self.checkpoints.save(state)):
            raise TrainingStopped(f"the run has ended, but its result could NOT be saved to {folder}")
        self.monitor.event("end", epoch=state.epoch, batch=0, best=dict(state.best))
        conditions = f"{self.config['val_resolution']} px, no test-time augmentation"
        self.monitor.log(f"finished {self.config['epochs']} epochs: {self.checkpoints.best_in_words(state.best, conditions)}")
        if self.config["report"] and distributed.rank() == 0:
            with self.monitor.warn_on_error(f"{REPORT}.html could not be written"):
                write_report(folder / REPORT, *report_of_run(read_run(folder, CONFIG), self.ledger.price_per_hour))
        if self.mirror is not None:
            self.mirror.finished = True
