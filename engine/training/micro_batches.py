"""A batch in parts that fit the memory, whose gradients add up to the batch's."""

from engine.system.distributed import gradient_sync, size
from engine.system.micro_batches import num_micro_batches


def micro_batches(state, images, targets, config, sync=True):
    """Yield (images, targets, share) of each micro-batch, its share being that of its images in the batch.

    With the last one the ranks exchange the gradients that have added up, unless `sync` is False.

    Args:
        images: [B, 3, H, W], this rank's shard of the batch.
        targets: [B] or [B, C].
    """
    parts = num_micro_batches(config["batch_size"], state.micro_batch_size, size())
    pairs = zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True)
    for number, (some_images, some_targets) in enumerate(pairs, 1):
        with gradient_sync(state.ddp_model, now=sync and number == parts):
            yield some_images, some_targets, len(some_targets) / config["batch_size"]


def backward(state, loss):
    """Add the gradient of a rank's part of the batch's mean loss to the parameters' gradients, at the GradScaler's scale."""
    state.scaler.scale(loss * size()).backward()  # DDP takes the mean over the ranks
