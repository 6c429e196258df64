"""What several GPUs can give, calculated: the all-reduce's bytes against the link's speed. Nothing here is measured."""

from typing import NamedTuple

PARAMETERS = 25_557_032  # of ResNet-50 with 1,000 classes; gradients are fp32
BUCKET_BYTES = 25 * 2**20  # of DistributedDataParallel: each is sent while the backward pass goes on with the others
FORWARD_SHARE = 1 / 3  # of a step's time

T4, A100 = 282, 2470  # images/s at 224 px of one: the seed's run; NVIDIA's published PyTorch figure
LINKS = {  # name: (GB/s of the all-reduce in each direction, where the figure is from)
    "PCIe 3.0 x16": (6.0, "assumed: 40 % of the nominal 15.75, as the bytes go through main memory"),
    "25 Gbit/s network": (3.1, "nominal, a g4dn.2xlarge's peak"),
    "10 Gbit/s network": (1.25, "nominal, AWS's limit of a single flow within a placement group"),
    "NVLink": (200.0, "as nccl-tests reports on 8 A100s, NVIDIA/nccl-tests issue 149"),
}
CASES = [
    ("T4", T4, "PCIe 3.0 x16", 256, (2, 4, 8)),
    ("T4", T4, "25 Gbit/s network", 256, (2, 4, 8)),
    ("T4", T4, "25 Gbit/s network", 1024, (4, 8)),
    ("T4", T4, "10 Gbit/s network", 1024, (4, 8)),
    ("A100", A100, "NVLink", 1024, (8,)),
]


class Scaling(NamedTuple):
    """A step of several GPUs; milliseconds."""

    bytes_sent: float  # by each GPU, and as many received
    exchange: float
    compute: float
    step_overlapped: float  # the exchange begins with the first bucket, and the last one comes when the backward pass is over
    step_in_turn: float


def scaling(gpus, batch_size, images_per_s, link_gb_per_s):
    """Return the Scaling of a ring all-reduce: each GPU sends 2 (n - 1) / n times the gradients' bytes.

    Args:
        batch_size: of all GPUs together.
        images_per_s: of one GPU; taken to be the same at its share of the batch.
    """
    gradients = 4 * PARAMETERS
    sent = 2 * (gpus - 1) / gpus * gradients
    compute = 1000 * batch_size / gpus / images_per_s
    exchange = sent / link_gb_per_s / 1e6
    last_bucket = exchange * (gradients % BUCKET_BYTES) / gradients
    overlapped = max(compute + last_bucket, FORWARD_SHARE * compute + exchange)
    return Scaling(sent, exchange, compute, overlapped, compute + exchange)


def scaling_tables():
    """Return the cases as lines of Markdown."""
    lines = [
        "Calculated, nothing of it measured: ResNet-50 at 224 px, fp32 gradients, "
        f"{T4} images/s of one T4 (the `seed` run) and {A100:,} of one A100 (NVIDIA's published figure). Speed of the links: "
        + "; ".join(f"{name} {speed:g} GB/s ({source})" for name, (speed, source) in LINKS.items())
        + ". From an exchange that is hidden behind the backward pass as far as buckets of 25 MiB allow to one that is not "
        "hidden at all.",
        "",
        "| GPUs | link | batch | sent by each, MB a step | exchange, ms | compute, ms | images/s | of n times one |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gpu, rate, link, batch_size, numbers in CASES:
        for gpus in numbers:
            of = scaling(gpus, batch_size, rate, LINKS[link][0])
            high, low = (1000 * batch_size / step for step in (of.step_overlapped, of.step_in_turn))
            lines.append(
                f"| {gpus} {gpu} | {link} | {batch_size:,} | {of.bytes_sent / 1e6:.0f} | {of.exchange:.1f} | "
                f"{of.compute:.0f} | {high:,.0f} to {low:,.0f} | {high / gpus / rate:.0%} to {low / gpus / rate:.0%} |"
            )
    return lines
