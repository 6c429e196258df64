"""How a batch is divided over the processes, and each one's share into micro-batches. Needs no torch."""

ONE_PIXEL_PX = 32  # of images so small ResNet's strides leave a single pixel for its last norms


def network_px(config, resolution):
    """Return the side in px at which the network sees a training crop of so many px: `colout` takes its share."""
    return int((1 - config["colout"]) * resolution)


def num_micro_batches(batch_size, micro_batch_size, processes):
    """Return the number of micro-batches in which each process takes its share: for all the same, and none empty.

    Synchronised batch norms wait for each other in each of them. Where a share has fewer images than that, they get larger.
    """
    largest_shard = -(-batch_size // processes)
    return min(-(-largest_shard // micro_batch_size), batch_size // processes)


def fewest_images(batch_size, micro_batch_size, processes):
    """Return the images of the smallest micro-batch of any process."""
    smallest_share = batch_size // processes
    return smallest_share // num_micro_batches(batch_size, micro_batch_size, processes) if smallest_share else 0


def enough_for_batch_norm(config, resolution, micro_batch_size, processes):
    """Return whether each micro-batch has two values per channel or more, without which batch norm has no variance.

    Args:
        resolution: px, of the images.
    """
    if resolution > ONE_PIXEL_PX or (config["sync_batch_norm"] and processes > 1):
        return True
    return fewest_images(config["batch_size"], micro_batch_size, processes) > 1
