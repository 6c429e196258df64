"""How fast an epoch's images go through, and how long the device waits for them."""

import time

import torch


class Throughput:
    """Images per second of an epoch, since the last reading and over all, and how long the device waited for them.

    Its clock runs from start(), or from its making, to stop(); what a checkpoint brings along by load() counts, too.

    Args:
        device: torch.device whose waiting is measured: of a GPU by its own clock, between the end of a step's work and the
            arrival of the next batch, so that a host that runs ahead counts for nothing.
        batch_size: images of a batch, of all processes together.
    """

    def __init__(self, device, batch_size):
        self._batch_size = batch_size
        self._on_gpu = device.type == "cuda"
        self.reset()

    def reset(self):
        """Begin a new epoch."""
        self.images, self._waited, self._earlier_seconds = 0, 0.0, 0.0
        self._waits = []  # (instant asked for, instant there) of batches not yet summed up
        self.start()

    def start(self):
        """Let the clock run from now on."""
        self.started = self._read_at = time.perf_counter()
        self._read_images, self._stopped = self.images, None

    def state(self):
        """Return what there is of the epoch so far, for a checkpoint; nothing before its first batch. Waits for the device."""
        seconds = self.seconds() if self.images else 0.0
        return {"images": self.images, "seconds": seconds, "waited_seconds": self.waited()}

    def load(self, state):
        """Go on from a checkpoint's state(), or from nothing; the clock stands until start()."""
        self.reset()
        if state is not None:
            self.images, self._waited, self._earlier_seconds = state["images"], state["waited_seconds"], state["seconds"]
        self._stopped = self.started

    def watch(self, batches):
        """Yield (images, labels) and count the images and the waiting for them."""
        batches = iter(batches)
        while True:
            asked = self._instant()
            try:
                images, labels = next(batches)
            except StopIteration:
                return
            self._waits.append((asked, self._instant()))
            self.images += self._batch_size
            yield images, labels

    def _instant(self):
        if not self._on_gpu:
            return time.perf_counter()
        return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))

    def waited(self):
        """Return the seconds that the device waited for batches so far; waits for the device."""
        if self._waits and self._on_gpu:
            self._waits[-1][1].synchronize()
        for asked, there in self._waits:
            self._waited += asked.elapsed_time(there) / 1000 if self._on_gpu else there - asked
        self._waits.clear()
        return self._waited

    def recent(self):
        """Return images/s since the last call."""
        now = time.perf_counter()
        rate = (self.images - self._read_images) / max(now - self._read_at, 1e-9)
        self._read_at, self._read_images = now, self.images
        self.waited()  # whoever asks has waited for the device: add up what there is
        return rate

    def stop(self):
        """Stop the clock: what comes after is not training."""
        self._stopped = time.perf_counter()

    def seconds(self):
        """Return the seconds that the clock has run."""
        return self._earlier_seconds + (self._stopped or time.perf_counter()) - self.started

    def overall(self):
        """Return images/s over all these seconds."""
        return self.images / max(self.seconds(), 1e-9)
