# SPDX-License-Identifier: Apache-2.0
"""Batch, learning rate, memory and time of a training of DePerceiver v2 `base` on COCO, on 1 to 64 GPUs: on paper.

    python examples/scaling_plan.py

prints the table of docs/scaling_out.md, which explains it. Nothing in it was measured on GPUs; change the numbers
below to those of your model, images and machine.
"""

from dataclasses import dataclass

IMAGES = 118_287  # of train2017
EPOCHS = 50


@dataclass(frozen=True)
class Model:
    """`base` at 800 x 1333 pixels; FLOPs and parameters are those of `deperceiver benchmark cost`."""

    parameters: float = 33.7e6
    trained: float = 33.5e6
    gflops_backbone: float = 174.7  # of an image, forward
    gflops_after: float = 124.3
    queries: int = 300
    denoising: int = 100  # queries beside them in training
    bytes_of_pixel: float = 727  # kept for the backward pass in bfloat16, counted on a CPU at two sizes
    bytes_of_batch: float = 123e6  # the same, whatever the size of the images
    pixels: int = 800 * 1333


@dataclass(frozen=True)
class Machine:
    """Assumptions."""

    gpus_of_node: int = 8
    flops: float = 312e12  # of an A100 in bfloat16, at best
    used: float = 0.25  # share of that which a detector reaches
    bandwidth_in_node: float = 200e9  # bytes a second of a GPU
    bandwidth_between_nodes: float = 25e9  # bytes a second of a node
    images_of_core: float = 30  # decoded and augmented a second: measured on one core of a server, COCO at 800 x 1333


REFERENCE_BATCH, REFERENCE_LR, REFERENCE_WARMUP = 16, 1e-4, 1000  # of the recipe coco-v2-base: 4 GPUs with 4 images
PER_GPU = 4
COUNTS = (1, 2, 4, 8, 16, 32, 64)


def memory(model: Model, images: int, shards: int = 1) -> float:
    """Bytes of a GPU: weights and gradients in float32, two moments of AdamW in shards, what the backward pass needs.

    A third more for what is there for a moment only: scores of attention, buffers of convolutions, fragments.
    """
    weights = 4 * model.parameters + 4 * model.trained
    moments = 8 * model.trained / shards
    copies = 0 if shards == 1 else 4 * model.parameters * (1 + 1 / shards)  # own shard, and the copy to evaluate
    kept = model.bytes_of_batch + images * model.pixels * model.bytes_of_pixel
    return weights + moments + copies + 4 / 3 * kept


def step_seconds(model: Model, machine: Machine, images: int) -> float:
    """Of the forward pass and the backward pass, which costs twice that; with the denoising queries of training."""
    after = model.gflops_after * (model.queries + model.denoising) / model.queries
    return 3 * images * 1e9 * (model.gflops_backbone + after) / (machine.used * machine.flops)


def reduction_seconds(model: Model, machine: Machine, gpus: int) -> float:
    """Of averaging the gradients by a ring, which passes each number on twice; the slowest link decides."""
    if gpus == 1:
        return 0.0
    bandwidth = machine.bandwidth_in_node if gpus <= machine.gpus_of_node else machine.bandwidth_between_nodes
    return 2 * (gpus - 1) / gpus * 4 * model.trained / bandwidth


def main(model: Model = Model(), machine: Machine = Machine()) -> None:
    print(
        "| GPUs | batch | `--gradient_accumulation_steps` | `--lr` | `--warmup_steps` | GB of a GPU | with FSDP2 "
        "| step, ms | reduction, ms | images/s | cores to load them | 50 epochs, hours |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for gpus in COUNTS:
        accumulation = max(1, REFERENCE_BATCH // (gpus * PER_GPU))
        batch = gpus * PER_GPU * accumulation
        scale = (batch / REFERENCE_BATCH) ** 0.5
        computing = accumulation * step_seconds(model, machine, PER_GPU)
        reduction = reduction_seconds(model, machine, gpus)
        rate = batch / (computing + reduction)
        cells = [
            gpus,
            batch,
            accumulation,
            f"{REFERENCE_LR * scale:.1e}",
            round(REFERENCE_WARMUP * REFERENCE_BATCH / batch),
            f"{memory(model, PER_GPU) / 1e9:.1f}",
            f"{memory(model, PER_GPU, gpus) / 1e9:.1f}" if gpus > 1 else "",
            round(1000 * computing),
            round(1000 * reduction),
            round(rate),
            -(-round(rate) // round(machine.images_of_core)),
            f"{IMAGES * EPOCHS / rate / 3600:.1f}",
        ]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
