"""Steps that leave no trace: to measure a machine, to compare compiled code with plain code, to find a learning rate."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.optim.lr_scheduler import LambdaLR

from engine.inference.weight_files import FoundWeights, load_weights
from engine.training.class_balance import class_weights
from engine.training.out_of_memory import take_step
from engine.training.plan import Rates
from engine.training.state import new_state

STEPS_PER_EPOCH = 10  # of a schedule that is not followed


@dataclass
class Trials:
    """Takes the run's own steps on weights that are then forgotten."""

    train_step: Callable  # (state, images, targets, config) -> StepResult
    build_model: Callable  # (config, number of classes, device) -> network
    num_classes: int
    device: torch.device
    precision: str
    initial: FoundWeights | None = None  # that the run begins with
    images: object = None  # the run's for training, which initial weights and class weights depend on
    rates: Rates | None = None  # that the machine was measured to have, or is said to have
    remarks: list = field(default_factory=list)  # lines on what the steps had to adapt to, to be logged

    def scratch_state(self, config, learning_rate=1e-6, compiled=False):
        """Return a TrainState with a run's first weights, and a rate that stays where it is set."""
        config = config | {"learning_rate": learning_rate}
        model = self.build_model(config, self.num_classes, self.device)
        if self.initial is not None:
            load_weights(model, self.initial, self.images.classes)
        state = new_state(model, config, STEPS_PER_EPOCH, self.precision, compiled)
        if self.images is not None:
            state.class_weights = class_weights(config, self.images, self.device)
        state.schedule = LambdaLR(state.optimizer, lambda step: 1.0)
        return state

    def step(self, state, images, targets, config):
        """Take a step and return its StepResult; it adapts to what fails as in a run."""
        return take_step(self.train_step, state, images, targets, config, self.remarks.append)
