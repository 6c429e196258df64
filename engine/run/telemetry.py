"""The GPU's figures by NVML: memory, utilisation, power, temperature, and what holds its clock down."""

import statistics
import threading
import time

import torch

SAMPLE_SECONDS = 1.0
THROTTLE_REASONS = {  # NVML's bits; the idle and the user's own settings are no trouble
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
}


class GpuFigures:
    """Readings of the run's GPU; without a GPU, or without NVML, there are simply none."""

    def __init__(self, device):
        self._handle = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid  # NVML ignores CUDA_VISIBLE_DEVICES: no index
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._nvml = pynvml
        except Exception:  # no nvidia-ml-py, no driver access, a container without NVML: the bar does without
            self._handle = None

    @property
    def available(self):
        return self._handle is not None

    def _ask(self, function, *arguments):
        """Return one NVML figure, or None where there is none: not every card knows all."""
        if self._handle is None:
            return None
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except Exception:  # NVML's own, of a GPU that has fallen off its bus, of an older binding
            return None

    def read(self):
        """Return {'memory_mib', 'memory_total_mib', 'utilization_percent'}, or {} where nothing can be read."""
        memory, busy = self._ask("nvmlDeviceGetMemoryInfo"), self._ask("nvmlDeviceGetUtilizationRates")
        if memory is None or busy is None:
            return {}
        return {
            "memory_mib": memory.used // 2**20,
            "memory_total_mib": memory.total // 2**20,
            "utilization_percent": busy.gpu,
        }

    def read_all(self):
        """Return read()'s figures with power_w, temperature_c, throttled and power_limits_w, each where it can be read.

        throttled is a list of reasons; the limits are the present one and the card's own.
        """
        figures = self.read()
        power = self._ask("nvmlDeviceGetPowerUsage")  # milliwatts
        temperature = self._ask("nvmlDeviceGetTemperature", 0)
        reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        limit, usual_limit = (self._ask(f"nvmlDeviceGetPowerManagement{name}") for name in ("Limit", "DefaultLimit"))
        if power is not None:
            figures["power_w"] = power / 1000
        if temperature is not None:
            figures["temperature_c"] = temperature
        if reasons is not None:
            figures["throttled"] = [name for bit, name in THROTTLE_REASONS.items() if reasons & bit]
        if limit is not None and usual_limit is not None:
            figures["power_limits_w"] = limit / 1000, usual_limit / 1000
        return figures

    def clock_mhz(self):
        """Return the clock of the multiprocessors now, or None where it cannot be read."""
        return self._ask("nvmlDeviceGetClockInfo", 1)

    def allocator_mib(self):
        """Return (peak of what tensors took, what PyTorch's allocator holds now) in MiB, or (None, None) without a GPU."""
        if not self.available:
            return None, None
        return torch.cuda.max_memory_allocated() / 2**20, torch.cuda.memory_reserved() / 2**20

    def text(self):
        """Return the figures for the bar, {'GPU': '11,701 MiB 98 %'} or {}."""
        figures = self.read()
        if not figures:
            return {}
        return {"GPU": f"{figures['memory_mib']:,} MiB {figures['utilization_percent']} %"}


class GpuSampler:
    """Reads the GPU's figures once a second in a thread of its own; without a GPU there is no thread.

    Args:
        gpu: GpuFigures.
    """

    def __init__(self, gpu, seconds=SAMPLE_SECONDS):
        self._gpu, self._seconds = gpu, seconds
        self._samples = []  # (instant, figures)
        self._fresh = []  # figures that fresh() has not returned yet
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = None

    def start(self):
        """Begin to sample."""
        if self._gpu.available:
            self._thread = threading.Thread(target=self._sample, name="gpu-sampler", daemon=True)
            self._thread.start()

    def stop(self):
        """End the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _sample(self):
        while not self._ended.wait(self._seconds):
            sample = time.monotonic(), self._gpu.read_all()
            with self._lock:
                self._samples.append(sample)
                self._fresh.append(sample[1])

    def fresh(self):
        """Return the samples, as GpuFigures.read_all gives them, since the last call."""
        with self._lock:
            fresh, self._fresh = self._fresh, []
        return fresh

    def summary(self):
        """Return the figures since the last call as numbers for an epoch's record, or {} if there are none."""
        with self._lock:
            samples, self._samples = self._samples, self._samples[-1:]  # the last one is where the next energy begins
        return summary_of(samples)


def summary_of_all(summaries):
    """Return what the summaries of several GPUs amount to: power and energy are sums, shares means, the others extremes."""
    ways = {"gpu_power_w": sum, "gpu_energy_wh": sum, "gpu_utilization_percent": statistics.mean}
    ways["gpu_utilization_lowest_percent"] = min
    together = {}
    for name in dict.fromkeys(name for summary in summaries for name in summary):
        values = [summary[name] for summary in summaries if name in summary]
        if name == "gpu_throttled_share":
            reasons = sorted({reason for shares in values for reason in shares})
            together[name] = {reason: sum(shares.get(reason, 0) for shares in values) / len(values) for reason in reasons}
        else:
            together[name] = ways.get(name, max)(values)
    return together


def summary_of(samples):
    """Return what samples amount to: {'gpu_utilization_percent': mean, 'gpu_energy_wh': ..., ...}.

    Args:
        samples: list of (seconds, figures as GpuFigures.read_all gives them).
    """

    def values(name):
        return [figures[name] for _, figures in samples if name in figures]

    summary = {}
    if busy := values("utilization_percent"):
        summary |= {"gpu_utilization_percent": statistics.mean(busy), "gpu_utilization_lowest_percent": min(busy)}
    if memory := values("memory_mib"):
        summary["gpu_memory_used_mib"] = max(memory)
    if temperature := values("temperature_c"):
        summary["gpu_temperature_highest_c"] = max(temperature)
    if power := values("power_w"):
        summary["gpu_power_w"] = statistics.mean(power)
        instants = [instant for instant, figures in samples if "power_w" in figures]
        steps = zip(instants, instants[1:], power, power[1:], strict=False)
        summary["gpu_energy_wh"] = sum((end - start) * (a + b) / 2 for start, end, a, b in steps) / 3600
    if throttled := values("throttled"):
        reasons = {reason for sample in throttled for reason in sample}
        shares = {reason: sum(reason in sample for sample in throttled) / len(throttled) for reason in sorted(reasons)}
        summary["gpu_throttled_share"] = shares
    return summary
