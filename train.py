"""Train ResNet-50 on ImageNet, or on any folder of images, on one GPU or on several.

python train.py                                the seed's run on data/imagenet
python train.py --recipe demo                  minutes on a CPU, no download
python train.py --recipe mild                  for most people: 76.19 % published, about 13 hours on a T4 (calculated)
python train.py --hours 12                     the best published recipe for a budget; --plan only says what it would take
python train.py --resume checkpoints/last.pt   go on where a run was stopped; --resume auto takes the newest good file
torchrun --nproc_per_node=4 train.py           the same run on four GPUs
"""

import sys
import time

from engine.cli.command_line import command_from_terminal, require_one_task

OWN_FLAGS = {
    "resume PATH": "checkpoint or run's folder to go on from; auto: the run in checkpoint_dir, or else a new run",
    "overwrite": "delete the run that checkpoint_dir holds and start anew",
    "check": "print a table of what this run finds on this machine, with a verdict each, and exit; status 1 if it would fail",
    "preview [N]": "write the first batch of epoch N (1), as the network will see it, to preview.png, and exit",
    "plan": "measure this machine for a minute, print how long the run will take, or without --recipe a menu, and exit",
    "hours H": "measure this machine, choose the epochs that fit into H hours (without --recipe also the recipe) and train; "
    "resumed, go on with that plan",
    "dollars D": "the same for the hours that D dollars pay for, at --price-per-hour",
    "stop-after-hours H": "save and end, with status 0, before this session is H hours old: the limit of a queue or notebook",
    "images-per-s N": "for the plan: N images/s in training at 224 px instead of measuring",
    "price-per-hour P": "what an hour of the machine costs, for the plan and to show dollars while it runs",
}
if __name__ == "__main__":  # before torch is imported: --help and typing errors answer at once
    BEGUN = time.perf_counter()
    COMMAND = command_from_terminal("train.py", __doc__, OWN_FLAGS)

import torch

from engine.inference.scoring import topk_correct
from engine.system.device import autocast, skip_unless_finite
from engine.system.errors import run_program
from engine.system.gpu_memory import OUTSIDE_STEPS, stop_on_oom
from engine.training import sam
from engine.training.check import check_run
from engine.training.loss import main_class, training_loss
from engine.training.micro_batches import backward, micro_batches
from engine.training.mixing import build_mixing
from engine.training.leaving import exit_status
from engine.training.opening import open_run
from engine.training.out_of_memory import cure, retry_on_oom
from engine.training.preview import write_preview
from engine.training.settling import print_plan
from engine.training.state import StepResult, new_state
from engine.training.statistics_snapshot import StatisticsSnapshot
from engine.training.validation import average_and_validate, stop_if_diverged
from model import build_model


def loss_and_gradient(state, images, targets, config, sync=True):
    """Add the batch's mean gradient to the parameters', in micro-batches; return its loss and hits, scalars on the device."""
    loss = torch.zeros((), device=images.device)
    correct = torch.zeros((), device=images.device)
    for some_images, some_targets, share in micro_batches(state, images, targets, config, sync):
        with autocast(images.device, state.precision):
            logits = state.ddp_model(some_images)
            part = training_loss(logits.float(), some_targets, config, state.class_weights) * share
        backward(state, part)
        loss += part.detach()
        correct += topk_correct(logits.detach(), main_class(some_targets), 1)
    return loss, correct


def train_step(state, images, targets, config, probe=False):
    """Take one optimizer step on a batch. A gradient that is not finite leaves the network as it was.

    The host never waits for the device.

    Args:
        images: [B, 3, H, W], ready for the network, on its device: this process's shard of the batch.
        targets: int64 [B], or float [B, C] where images were mixed.
        probe: only find out whether the step fits the memory: exchange no gradients and change no weights.
    """
    state.optimizer.zero_grad(set_to_none=True)
    with StatisticsSnapshot(state.model) as statistics:  # a step that fails in here can be taken again
        loss, correct = loss_and_gradient(state, images, targets, config, sync=not probe)
        if sam.is_due(state, config, probe):
            with sam.uphill(state, config):
                loss_and_gradient(state, images, targets, config, sync=not probe)
        if probe:
            return StepResult(loss, None, correct)
        state.scaler.unscale_(state.optimizer)  # clip the true gradient, not the scaled one
        grad_norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config["grad_clip_value"])
        skip_unless_finite(state.scaler, state.optimizer, grad_norm)
        statistics.restore_unless(torch.isfinite(grad_norm))
    with stop_on_oom(f"while the weights were being changed; {cure(state, len(targets))}"):
        state.scaler.step(state.optimizer)
        state.scaler.update()
    state.schedule.step()
    return StepResult(loss, grad_norm, correct)


def train_one_epoch(state, run, config):
    """Train on what is left of the epoch in progress; return its TrainingMetrics."""
    state.ddp_model.train()
    state.speed.start()
    if state.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # gpu_memory_peak_mib is each epoch's own
    mix = build_mixing(config, run.num_classes)
    for images, labels in state.speed.watch(run.training_batches(state)):
        with state.changing():
            images, targets = mix(images, labels)
            for attempt in retry_on_oom(train_step, state, images, targets, config, run.monitor.log):
                with attempt:
                    result = train_step(state, images, targets, config)
            state.count_step(result, config)
        metrics = None
        if state.batch % config["log_every_steps"] == 0:
            metrics = state.sums.read()  # here, and only here, the host waits for the device
            stop_if_diverged(metrics, state, config)
        run.monitor.advance(metrics, state.learning_rate, state.speed)
        run.checkpoints.save_if_due(state)
    metrics = state.sums.read()
    state.speed.stop()
    stop_if_diverged(metrics, state, config)
    return metrics


@stop_on_oom(f"{OUTSIDE_STEPS}; a run goes on with --resume auto")
def main(command, begun=None):
    """Train as the command asks; return the exit status."""
    begun = begun or time.perf_counter()
    require_one_task(command)
    if "plan" in command.options:
        return print_plan(command, train_step, build_model, begun)
    if "check" in command.options:
        return check_run(command, build_model)
    if "preview" in command.options:
        return write_preview(command)
    with exit_status() as status, open_run(command, train_step, build_model, begun) as run:
        config = run.config  # final
        model = build_model(config, run.num_classes, run.device)
        state = new_state(model, config, run.steps_per_epoch, run.precision, run.compile_choice["compiled"])
        run.restore(state)
        while state.epoch < config["epochs"]:
            trained = train_one_epoch(state, run, config)
            scores = average_and_validate(state, run)
            record = run.record(state, trained, scores)
            state.count_epoch()
            run.checkpoints.save(state)
            run.monitor.show_epoch(record)  # after the save: nothing depends on it
        run.finish(state)
    return status.code


if __name__ == "__main__":
    sys.exit(run_program("train.py", main, COMMAND, BEGUN))
