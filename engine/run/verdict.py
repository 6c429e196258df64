"""What the figures of a run amount to: alarms, each raised once with what to do, and once more when it ends.

A false alarm is worse than silence. So each threshold below has its source, or the measurement that it lies well beyond
(docs/verdict.md), a figure is judged over a window that is long enough, and an alarm ends well below where it begins.
"""

import math
import statistics
from typing import NamedTuple

from engine.run.published import PUBLISHED_FOR, published_curve, trains_on_imagenet, validates_on_imagenet
from engine.run.weights import WEIGHTS

WAITING_SECONDS = 60.0  # of training, over which the waiting for data is judged
WAITING, WAITING_ENDS = 0.10, 0.05  # shares of that time
READING_IS_TO_BLAME = 0.5  # share of the workers' time that goes into reading files
BUSY = 0.75  # share of their time that workers read or compute; below it they wait for a core
STARVED = 0.5  # of the time of a CPU that waits for them: then it is not the training that has the cores
STALLED_SECONDS = 60.0  # without a batch: of 256 images that is 4 images/s, a hundredth of what one core decodes
GPU_SAMPLES = 60  # one a second
HELD_DOWN, HELD_DOWN_ENDS = 0.10, 0.02  # shares of the samples in which the clock is held down
FULL, FULL_ENDS = 0.02, 0.04  # shares of the GPU's memory that nothing has or keeps: 300 MiB of a T4's 15 GiB
LEARNING_STEPS = 50  # over which loss, gradient and skipped steps are judged
IN_A_ROW = 2  # windows that must agree
LEARNED_NOTHING_STEPS = 1000  # and an epoch: by then a run has learned something
LEARNED_NOTHING = 0.98  # of the loss of guessing
CHANCE_SIGMAS = 3  # standard deviations of what guessing scores on so many validation images
FALLEN = 0.1  # of the loss of guessing; from then on a rise is told from noise
RISEN, RISEN_ENDS = 0.5, 0.25  # shares of what the loss had fallen below guessing
EXPLODED, EXPLODED_ENDS = 10.0, 5.0  # times the median gradient norm of the windows before
USUAL_WINDOWS = 4  # that a usual gradient norm is known from
# Of LEARNING_STEPS: a GradScaler's first scale, 2**16, is at 1 after 16; later 1 step of 2,000 is usual.
SKIPPED, SKIPPED_ENDS = 16, 1
BELOW_POINTS, BELOW_ENDS_POINTS, EPOCHS_LATE = 10.0, 5.0, 2  # one epoch of FFCV's 16 makes up to 14 points
APART_POINTS, APART_ENDS_POINTS, APART_EPOCHS = 40.0, 25.0, 2  # of training top-1, augmented, over validation


class Change(NamedTuple):
    """An alarm that begins or ends."""

    name: str  # short, for the bar
    begins: bool
    text: str  # what is wrong, with its figure, and what to do; or how it ended


class Work(NamedTuple):
    """What data workers did, in seconds of all of them together."""

    making: float = 0.0  # batches: reading, decoding, augmenting
    reading: float = 0.0  # files, as part of it
    computing: float = 0.0  # on a core, as part of it

    def plus(self, other):
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other):
        return Work(*(a - b for a, b in zip(self, other, strict=True)))


class Sums(NamedTuple):
    """Of an epoch so far."""

    steps: int
    skipped: int
    loss: float  # of the steps that counted
    grad_norm: float
    seconds: float
    waited: float  # seconds in which the device waited for data
    work: Work

    def minus(self, other):
        plain = (a - b for a, b in zip(self[:-1], other[:-1], strict=True))
        return Sums(*plain, self.work.minus(other.work))

    def plus(self, other):
        plain = (a + b for a, b in zip(self[:-1], other[:-1], strict=True))
        return Sums(*plain, self.work.plus(other.work))


NOTHING = Sums(0, 0, 0.0, 0.0, 0.0, 0.0, Work())


def sums_of(metrics, batch_size, seconds, waited, work):
    """Return the Sums that an epoch's TrainingMetrics and its clock amount to."""
    steps = metrics.images // batch_size
    counted = steps - metrics.skipped_steps
    loss, grad_norm = ((value * counted if counted else 0.0) for value in (metrics.loss, metrics.grad_norm))
    return Sums(steps, metrics.skipped_steps, loss, grad_norm, seconds, waited, work)


class Data(NamedTuple):
    """What makes the batches."""

    workers: int
    cores: int  # that this process may use
    packed: bool  # whether the images lie in a packed file
    on_gpu: bool  # else the training itself takes the cores, and workers that wait for one are no fault


def loss_of_guessing(loss, classes):
    """Return the loss of a network that gives every class the same probability, in nats."""
    if loss == "bce":  # summed over the classes
        return math.log(classes) - (classes - 1) * math.log1p(-1 / classes) if classes > 1 else 0.0
    return math.log(classes)


class Verdict:
    """Holds a run's figures against what they should be.

    Args:
        config: the run's.
        recipe: its name.
        classes, images: of the training images; counts.
        data: Data.
        guess_top1: %, of the validation images, that always naming their commonest class gets right.
    Attributes:
        active: {name: Change that began it} of the alarms that have not ended.
    """

    def __init__(self, config, recipe, classes, images, data, guess_top1):
        self.active = {}
        self._config, self._recipe, self._data, self._guess_top1 = config, recipe, data, guess_top1
        self._is_published_for = config["architecture"] == PUBLISHED_FOR and trains_on_imagenet(classes, images)
        self._steps_per_epoch = images // config["batch_size"]
        self._guessing = loss_of_guessing(config["loss"], classes)
        self._before = self._epoch = None
        self._waiting, self._learning, self._gpu = NOTHING, NOTHING, []
        self._rate, self._lowest, self._norms = 0.0, math.inf, []
        self._in_a_row = {}

    @property
    def batch_size(self):
        return self._config["batch_size"]

    # Each returns the Changes.

    def read(self, epoch, sums, learning_rate):
        """Judge the Sums of an epoch, counted from 0, at a reading of the loss."""
        self._rate = learning_rate
        if epoch != self._epoch:  # its first batches waited for the workers to begin
            self._epoch, self._before = epoch, sums
            return []
        since, self._before = sums.minus(self._before), sums
        changes = []
        self._waiting, self._learning = self._waiting.plus(since), self._learning.plus(since)
        if self._waiting.seconds >= WAITING_SECONDS:
            changes += self._judge_waiting(self._waiting)
            self._waiting = NOTHING
        if self._learning.steps >= LEARNING_STEPS:
            changes += self._judge_learning(self._learning)
            self._learning = NOTHING
        return changes

    def judge_gpu(self, samples, allocated_mib=None, reserved_mib=None):
        """Judge samples of the GPU's figures, as GpuFigures.read_all gives them; they are gathered until they are enough.

        Args:
            allocated_mib, reserved_mib: peak of what PyTorch's tensors took, and what its allocator holds now.
        """
        self._gpu += samples
        if len(self._gpu) < GPU_SAMPLES:
            return []
        samples, self._gpu = self._gpu, []
        return self._judge_clock(samples) + self._judge_memory(samples, allocated_mib, reserved_mib)

    def judge_stall(self, seconds, workers):
        """Judge how long no batch has come.

        Args:
            workers: {process id: letter of its state in /proc} of the data workers.
        """
        stopped = [number for number, letter in workers.items() if letter in "Tt"]
        asleep = [number for number, letter in workers.items() if letter == "D"]
        advice = "look at the disk that holds the images (df, dmesg), and at the data workers (ps)"
        if stopped:
            advice = f"data worker {stopped[0]} is stopped (SIGSTOP, or a debugger): kill -CONT {stopped[0]}"
        elif asleep:
            advice = f"data worker {asleep[0]} waits for the disk: see whether the disk or share with the images answers"
        return self._settle(
            "no batch",
            seconds >= STALLED_SECONDS,
            seconds < STALLED_SECONDS,
            f"no batch for {seconds:.0f} s; {advice}",
            "one came",
        )

    def judge_epoch(self, record):
        """Judge an epoch's record, as metrics.jsonl has it."""
        return self._judge_chance(record) + self._judge_distance(record) + self._judge_curve(record)

    # The figures -----------------------------------------------------------------------------------------------------

    def _judge_waiting(self, window):
        share = window.waited / window.seconds
        busy = window.work.reading + window.work.computing >= BUSY * window.work.making
        text = f"{share:.0%} of the time the device waits for data; {blame(window.work, self._data)}"
        begins = share > WAITING and (busy or self._data.on_gpu or share > STARVED)
        return self._settle("waiting for data", begins, share < WAITING_ENDS, text, f"{share:.0%} now")

    def _judge_learning(self, window):
        counted, changes = window.steps - window.skipped, []
        text = (
            f"{window.skipped} of {window.steps} steps skipped, their loss or gradient not being finite: lower --learning-rate "
            f"(now {self._rate:.3g}), or try --precision fp32"
        )
        changes += self._settle(
            "skipped steps",
            window.skipped > SKIPPED * window.steps / LEARNING_STEPS,
            window.skipped <= SKIPPED_ENDS * window.steps / LEARNING_STEPS,
            text,
        )
        if not counted:
            return changes
        return changes + self._judge_loss(window.loss / counted) + self._judge_gradient(window.grad_norm / counted)

    def _judge_loss(self, loss):
        fallen = self._guessing - self._lowest
        risen = (loss - self._lowest) / fallen if fallen > FALLEN * self._guessing else 0.0
        text = (
            f"the loss has risen from {self._lowest:.3f} to {loss:.3f} at rate {self._rate:.3g}: go back to an earlier "
            "checkpoint (epoch_NNN.pt) and lower --learning-rate"
        )
        changes = self._settle("loss rising", self._lasting("rising", risen > RISEN), risen < RISEN_ENDS, text, f"{loss:.3f}")
        self._lowest = min(self._lowest, loss)
        return changes

    def _judge_gradient(self, norm):
        usual = statistics.median(self._norms) if len(self._norms) >= USUAL_WINDOWS else math.inf
        text = (
            f"the gradient's norm is {norm:.3g} at rate {self._rate:.3g}, and was {usual:.3g}: lower --learning-rate, lengthen "
            "--warmup-epochs, or clip with --grad-clip-value"
        )
        changes = self._settle(
            "gradient exploding", norm > EXPLODED * usual, norm < EXPLODED_ENDS * usual, text, f"its norm is {norm:.3g}"
        )
        if "gradient exploding" not in self.active:
            self._norms = [*self._norms, norm][-100:]
        return changes

    def _judge_clock(self, samples):
        seen = [sample["throttled"] for sample in samples if "throttled" in sample]
        if not seen:
            return []
        held = {}
        for reasons in seen:
            for reason in reasons:
                held[reason] = held.get(reason, 0) + 1 / len(seen)
        limits = [sample["power_limits_w"] for sample in samples if "power_limits_w" in sample]
        lowered = bool(limits) and limits[-1][0] < limits[-1][1]
        if not lowered:  # a card at its own limit does what it is built for
            held.pop("power cap", None)
        reason = max(held, key=held.get, default="")
        share = held.get(reason, 0.0)
        hot = max((sample["temperature_c"] for sample in samples if "temperature_c" in sample), default=None)
        at = f" at up to {hot} °C" if hot is not None else ""
        cure = "it is too hot: look at fans, air flow and what else heats the machine"
        if reason == "power cap":
            now, usual = limits[-1]
            cure = f"its power limit is {now:.0f} W, and usually {usual:.0f} W: sudo nvidia-smi -pl {usual:.0f}"
        elif reason == "power brake":
            cure = "the machine's power supply asks for it: look at its power supplies and cables"
        text = f"{share:.0%} of the time the GPU's clock is held down ({reason}{at}); {cure}"
        return self._settle("throttled", share > HELD_DOWN, share < HELD_DOWN_ENDS, text)

    def _judge_memory(self, samples, allocated_mib, reserved_mib):
        known = [sample for sample in samples if "memory_mib" in sample]
        if not known or allocated_mib is None:
            return []
        total, used = known[-1]["memory_total_mib"], max(sample["memory_mib"] for sample in known)
        room = total - used + max(reserved_mib - allocated_mib, 0)  # what the allocator keeps for itself is no lack
        text = (
            f"GPU memory is nearly full: {room:,.0f} of {total:,} MiB are left; --memory low needs less, as does a smaller "
            "--micro-batch-size, and nvidia-smi shows who else is there"
        )
        return self._settle("memory nearly full", room < FULL * total, room > FULL_ENDS * total, text, f"{room:,.0f} MiB left")

    def _judge_chance(self, record):
        """Judge whether validation and training are both no better than guessing."""
        best, loss, count = _best_top1(record), record.get("train_loss"), record.get("val_images")
        if best is None or loss is None or not count or self._guessing == 0:
            return []
        steps, guess = record["epoch"] * self._steps_per_epoch, self._guess_top1
        above_chance = guess + CHANCE_SIGMAS * math.sqrt(guess * (100 - guess) / count)
        at_chance, learning = best <= above_chance, loss < LEARNED_NOTHING * self._guessing
        late = at_chance and steps >= LEARNED_NOTHING_STEPS
        text = (
            f"after {steps:,} steps validation top-1 is {best:.2f} %, that of guessing, and the training loss {loss:.3f} "
            f"(guessing: {self._guessing:.3f}): look for a rate (lr_finder.py), at a batch (train.py --preview), at the labels"
        )
        nothing = self._lasting("nothing", late and not learning)
        return self._settle("nothing learned", nothing, not at_chance or learning, text, f"{best:.2f} %")

    def _judge_distance(self, record):
        trained, best = record.get("train_top1"), _best_top1(record)
        if trained is None or best is None:
            return []
        apart = trained - best
        text = (
            f"training top-1, augmented, is {trained:.2f} % and validation {best:.2f} %: it learns its images by heart, "
            "or validation sees others: more --augmentation or fewer --epochs, and compare both folders' images and labels"
        )
        lasting = self._lasting("apart", apart > APART_POINTS, APART_EPOCHS)
        return self._settle("training above validation", lasting, apart < APART_ENDS_POINTS, text, f"{apart:.1f} points apart")

    def _judge_curve(self, record):
        top1, published = _comparable_top1(record), self._published_at(record["epoch"])
        is_about_it = self._is_published_for and validates_on_imagenet(record.get("val_images"))
        if top1 is None or published is None or not is_about_it:
            return []
        (now, earlier), name = published
        below, view = now - top1, f"{record['val_resolution']} px" + (", with flip" if "val_flip_top1" in record else "")
        text = (
            f"validation top-1 {top1:.2f} % at {view}, {below:.1f} points below the {now:.1f} % published after epoch "
            f"{record['epoch']} ({name}): compare configuration, images and labels with the recipe's before it goes on"
        )
        is_below = below > BELOW_POINTS and top1 < earlier
        return self._settle("below the published curve", is_below, below < BELOW_ENDS_POINTS, text, f"{below:.1f} points")

    def _published_at(self, epoch):
        """Return ((top-1 after an epoch, the same EPOCHS_LATE earlier), name) of the recipe's published curve, or None."""
        found = published_curve(self._recipe, self._config["epochs"])
        if found is None or len(found[0]) < 2:
            return None
        curve, name = found
        now, earlier = (_between(curve, number) for number in (epoch, epoch - EPOCHS_LATE))
        return None if now is None or earlier is None else ((now, earlier), name)

    # Beginning and end -----------------------------------------------------------------------------------------------

    def _lasting(self, what, holds, times=IN_A_ROW):
        self._in_a_row[what] = self._in_a_row.get(what, 0) + 1 if holds else 0
        return self._in_a_row[what] >= times

    def _settle(self, name, begins, ends, text, now=None):
        """Return [Change] where the alarm begins or ends, else []."""
        if name not in self.active and begins:
            self.active[name] = Change(name, True, text)
            return [self.active[name]]
        if name in self.active and ends:
            del self.active[name]
            return [Change(name, False, f"over: {name}" + (f" ({now})" if now else ""))]
        return []


def blame(work, data):
    """Return in words what holds up the batches, from the shares of the workers' time, and what to do."""
    if not work.making:
        return "the data workers have made nothing"
    reading, computing = work.reading / work.making, work.computing / work.making
    who = "the process itself, without data workers," if not data.workers else f"{data.workers} data worker"
    who += "s" if data.workers > 1 else ""
    shares = f"{who} spent {reading:.0%} of the time reading files and {computing:.0%} computing"
    if reading > READING_IS_TO_BLAME:
        cure = "put the images on a faster disk" + ("" if data.packed else ", or pack them with python prepare_data.py")
        return f"{shares}: the disk is to blame; {cure}"
    if reading + computing < BUSY:
        return f"{shares}, and waited for a core otherwise: see with top who else takes the {data.cores} cores, or rent more"
    if data.workers < data.cores:
        return f"{shares}, and {data.cores} cores are there: too few workers; --num-workers {data.cores}"
    cure = "less --augmentation" if data.packed else "pack the images with python prepare_data.py, or less --augmentation"
    return f"{shares}, as many as there are cores: decoding is to blame; {cure}"


def _best_top1(record):
    scores = [record.get(f"{weights.column}_top1") for weights in WEIGHTS.values()]
    return max((score for score in scores if score is not None), default=None)


def _comparable_top1(record):
    """Return the raw weights' top-1, with the mirror image where that was scored, too: as FFCV's is."""
    return record.get("val_flip_top1", record.get("val_top1"))


def _between(curve, epoch):
    """Return a curve's value at an epoch, between its points linearly, or None outside of them."""
    if epoch in curve:
        return curve[epoch]
    low, high = ([e for e in curve if e < epoch], [e for e in curve if e > epoch])
    if not low or not high:
        return None
    a, b = max(low), min(high)
    return curve[a] + (curve[b] - curve[a]) * (epoch - a) / (b - a)
