"""A ring of memory in which worker processes make batches and from which the main process copies them to the device."""

import contextlib
import mmap

import torch

BATCHES_HELD = 2  # that the main process still reads: the one in use and the one before it, whose copy may be under way


class BatchBuffers:
    """Buffers for a batch each, shared with the processes that are forked after their making.

    Anonymous shared memory: it is no file in /dev/shm, whose 64 MB in a container often do not suffice, and its pages are
    faulted in once instead of for every batch.

    Args:
        count: buffers.
        batch_size: images that a buffer holds.
        resolution: px, their largest side.
    """

    def __init__(self, count, batch_size, resolution):
        label_bytes = 8 * batch_size
        self._labels, self._pixels = [], []
        for _ in range(count):
            memory = torch.frombuffer(mmap.mmap(-1, label_bytes + batch_size * resolution**2 * 3), dtype=torch.uint8)
            self._labels.append(memory[:label_bytes].view(torch.int64))
            self._pixels.append(memory[label_bytes:])
        self._pinned = []

    def __len__(self):
        return len(self._labels)

    def batch(self, number, count, resolution):
        """Return (images uint8 [count, resolution, resolution, 3], labels int64 [count]) that lie in a buffer."""
        size = count * resolution**2 * 3
        return self._pixels[number][:size].view(count, resolution, resolution, 3), self._labels[number][:count]

    def pin(self):
        """Lock the buffers in main memory, so that a GPU fetches from them while it computes; return whether that worked.

        After the fork: the driver may keep locked memory from being handed down.
        """
        for labels, pixels in zip(self._labels, self._pixels, strict=True):
            start, size = labels.data_ptr(), pixels.data_ptr() + pixels.numel() - labels.data_ptr()
            if not _succeeds(torch.cuda.cudart().cudaHostRegister(start, size, 0)):
                self.unpin()
                return False
            self._pinned.append(start)
        return True

    def unpin(self):
        """Undo pin()."""
        while self._pinned:
            _succeeds(torch.cuda.cudart().cudaHostUnregister(self._pinned.pop()))


def _succeeds(cuda_status):
    """Return whether a call of the CUDA runtime succeeded; if not, nothing of its failure is left behind.

    The runtime remembers it, and the next operation would raise it: a throw-away one takes it.
    """
    if int(cuda_status) == 0:
        return True
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
    return False
