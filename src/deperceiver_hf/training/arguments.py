# SPDX-License-Identifier: Apache-2.0
"""Options of a training run, under the original's names where they keep their meaning (`docs/original_flags.md`).

Four groups of options, each a dataclass, make up the one flat `TrainingOptions`. Options of the model default to
`None`, "not given": only so can an option that an architecture or a saved model does not take be refused.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from accelerate.utils import LoggerType
from transformers import HfArgumentParser

from ..data.transforms import AUGMENTATIONS
from ..evaluation.coco_metric import COCO_SIZE_BOUNDARIES, areas_of_sizes
from ..machine import PRECISIONS

ARCHITECTURE_NAMES = ("deperceiver", "deperceiver_v2", "detr", "deformable_detr", "rt_detr_v2", "d_fine")


def _option(help_text: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass
class ModelOptions:
    _argument_group_name = "model"

    architecture: Literal[ARCHITECTURE_NAMES] = _option(
        "detr, deformable_detr, rt_detr_v2 and d_fine train transformers' models on the same backbone, data and "
        "schedule, for comparison: detr with DePerceiver's loss, the others with their own.",
        "deperceiver",
    )
    preset: str | None = _option("Size of a deperceiver_v2: nano, small, base or large; base if not given.")
    config: list[str] | None = field(
        default=None,
        metadata={
            "help": "Fields of the new model's configuration as FIELD=VALUE, the value in JSON or a plain string; "
            "they win over all other options."
        },
    )
    model: str | None = _option("Start from this saved model (directory or Hub id) instead of a new one.")
    backbone: str | None = _option("Name of a timm model that returns feature maps; resnet50 if not given.")
    pretrained_backbone: str | None = _option(
        "Weights a new model's backbone starts from: a timm model with its tag, or a local file. "
        "By default the ImageNet weights of the backbone (resnet50.tv_in1k for resnet50)."
    )
    no_pretrained_backbone: bool = _option("Start the backbone of a new model from random weights.", False)
    downsample_factor: Literal[4, 8, 16, 32] | None = _option(
        "Pixels per cell of the feature map that the tokens come from; 32 if not given, or the preset's."
    )
    multiscale: bool = _option("Take tokens from the feature maps of strides 8, 16 and 32 together.", False)
    dilation: bool = _option("Dilate the last stage of the backbone instead of striding it (DC5).", False)
    position_embedding: Literal["sine", "learned"] | None = _option("Kind of position encoding; sine if not given.")
    num_latents: int | None = _option("Length of the latent array; 1024 if not given (the paper: 2048).")
    enc_blocks: int | None = _option("Passes through the encoder's shared self-attention layers; 3 if not given.")
    enc_layers_per_block: int | None = _option("Self-attention layers in one such pass; 6 if not given.")
    enc_layers: int | None = _option(
        "Encoder layers of DETR and Deformable DETR, 6 if not given, and of RT-DETRv2 and D-FINE, 1."
    )
    dec_layers: int | None = _option(
        "Decoder layers; 3 if not given, 6 for transformers' models, the preset's for deperceiver_v2. A DePerceiver "
        "with --no_aux_loss has one cross-attention instead."
    )
    dim_feedforward: int | None = _option(
        "Hidden width of the MLPs of transformers' models; if not given, 2048 in DETR and 4 times the width elsewhere."
    )
    hidden_dim: int | None = _option(
        "Width of tokens, latents and queries; 256 if not given, the preset's for deperceiver_v2."
    )
    nheads: int | None = _option(
        "Heads of self-attention in DePerceiver, of every attention elsewhere; 8 if not given, the preset's for "
        "deperceiver_v2."
    )
    dropout: float | None = _option(
        "Dropout everywhere; if not given, 0.1 in DETR, Deformable DETR and DePerceiver's decoder of several layers, "
        "0 elsewhere."
    )
    num_queries: int | None = _option(
        "Object queries, the most objects found in an image; if not given, 100 in DePerceiver and DETR, the preset's "
        "for deperceiver_v2, 300 elsewhere."
    )
    no_aux_loss: bool = _option(
        "Loss after the last decoder layer only; a DePerceiver has one cross-attention then.", False
    )
    set_cost_class: float | None = _option(
        "Weight of the classification in the matching; 1 if not given, 2 in deperceiver_v2, RT-DETRv2 and D-FINE."
    )
    set_cost_bbox: float | None = _option("Weight of the L1 distance in the matching; 5 if not given.")
    set_cost_giou: float | None = _option("Weight of the generalised IoU in the matching; 2 if not given.")
    bbox_loss_coef: float | None = _option("Weight of the L1 distance in the loss; 5 if not given.")
    giou_loss_coef: float | None = _option("Weight of the generalised IoU in the loss; 2 if not given.")
    eos_coef: float | None = _option("Weight of the no-object class in the cross entropy; 0.1 if not given.")
    attn_implementation: Literal["eager", "sdpa"] | None = _option(
        "How attention is computed in training; transformers' choice if not given. On a CPU, eager is often faster."
    )
    gradient_checkpointing: bool = _option("Recompute activations in the backward pass to save memory.", False)


@dataclass
class DataOptions:
    _argument_group_name = "data"

    dataset: str = _option(
        "COCO directory, Hub id or local `datasets` directory, or 'synthetic', also with options: "
        "'synthetic:image_size=128,min_objects=2,max_objects=6,num_samples=500,seed=3'.",
        "synthetic",
    )
    train_split: str = _option("Split to train on.", "train")
    eval_split: str = _option("Split to evaluate on.", "val")
    shortest_edge: int | None = _option(
        "Size of the shortest edge in evaluation and inference, and the largest in training; 800 if not given."
    )
    longest_edge: int | None = _option("Limit of the longest edge; 1333 if not given.")
    augmentation: Literal[AUGMENTATIONS] = _option(
        "original: flip, random resize and crop, as DETR; flip: flip only; none: images as they are; crop: flip, mild "
        "crop and change of colours, always at full size; crop_any_orientation: the same for images without an up.",
        "original",
    )
    cache_images: bool = _option(
        "Keep decoded images in memory, 3 bytes a pixel, for small data sets; needs --num_workers 0.", False
    )
    batch_size: int = _option("Images in a batch of one process.", 2)
    num_workers: int = _option("Processes that load images, for each training process.", 2)
    group_by_aspect_ratio: bool = _option("Make batches of images that are all wide or all tall.", False)
    max_train_samples: int | None = _option("Train on the first images only.")
    max_eval_samples: int | None = _option("Evaluate on the first images only.")


@dataclass
class OptimizationOptions:
    _argument_group_name = "optimization"

    lr: float = _option("Learning rate.", 1e-4)
    lr_backbone: float = _option("Learning rate of the backbone; 0 freezes it.", 1e-5)
    weight_decay: float = _option("Weight decay of AdamW.", 1e-4)
    clip_max_norm: float = _option("Clip the gradient to this norm; 0 does not clip.", 0.1)
    epochs: int = _option("Passes over the training set.", 50)
    max_steps: int | None = _option("Stop after this many optimizer steps even if epochs remain.")
    max_minutes: float | None = _option("Stop after this much training even if steps remain.")
    lr_scheduler: Literal["step", "constant", "linear", "cosine", "wsd"] = _option(
        "step divides the rate by 10 every --lr_drop epochs; linear and cosine fall to 0 at the end, which is that of "
        "the steps or of --max_minutes, whichever is nearer; wsd is constant and falls linearly over the last part.",
        "step",
    )
    lr_drop: int | None = _option("Epochs between two drops of the rate; 33 if not given.")
    decay_fraction: float | None = _option("Part of the training in which wsd falls to 0; 0.4 if not given.")
    warmup_steps: int = _option("Optimizer steps over which the rate rises from 0.", 0)
    gradient_accumulation_steps: int = _option("Batches whose gradients are averaged into one optimizer step.", 1)
    amp: bool = _option("Mixed precision in float16 (in bfloat16 with --use_bfloat).", False)
    use_bfloat: bool = _option("Mixed precision in bfloat16.", False)
    mixed_precision: Literal[("auto", *PRECISIONS)] = _option(
        "The same by name. auto: what `accelerate launch` was told, else bfloat16 where the hardware computes in it, "
        "float16 on older CUDA devices, float32 elsewhere.",
        "auto",
    )
    seed: int = _option("Seed of weights, order, augmentation and dropout.", 42)

    @property
    def precision(self) -> str:
        """`"no"`, `"fp16"`, `"bf16"` or `"auto"`, see [`~deperceiver_hf.machine.choose_precision`]."""
        if self.use_bfloat:
            return "bf16"
        return "fp16" if self.amp else self.mixed_precision


@dataclass
class RunOptions:
    _argument_group_name = "run"

    output_dir: str | None = _option("Where everything is written; outputs/RUN_NAME if not given.")
    run_name: str = _option("Name of the run, for its directory and its trackers.", "deperceiver")
    project: str = _option("Name of the project in trackers.", "deperceiver")
    overwrite_output_dir: bool = _option("Delete what an earlier run left in the output directory.", False)
    resume: str | None = _option(
        "Continue from a training state, or from the newest in the output directory with 'auto' (which starts anew "
        "if there is none)."
    )
    eval_every: int = _option("Epochs between evaluations; 0 evaluates never.", 1)
    eval_steps: int | None = _option("Evaluate every so many optimizer steps instead, and at the end.")
    save_top_k: int = _option("How many models of the highest AP to keep.", 3)
    save_every: int = _option("Epochs between two savings of the training state.", 1)
    checkpointing_steps: int | None = _option("Save the training state every so many steps, besides after epochs.")
    size_boundaries: list[float] = field(
        default_factory=lambda: list(COCO_SIZE_BOUNDARIES),
        metadata={
            "help": "Sides of squares, in pixels of the data, whose areas part small, medium and large objects.",
            "metavar": ("SMALL", "MEDIUM"),
        },
    )
    log_every: int = _option("Optimizer steps between two lines of the log.", 50)
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={
            "help": "Trackers of accelerate, such as tensorboard or wandb; none: files in the output directory only."
        },
    )


@dataclass
class TrainingOptions(RunOptions, OptimizationOptions, DataOptions, ModelOptions):
    """All options of a training run; a combination that makes no sense raises `ValueError` when it is made."""

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_data()
        self._check_model()
        self._check_optimization()
        self._check_run()

    def _check_ranges(self) -> None:
        at_least_one = (
            *("num_latents", "enc_blocks", "enc_layers_per_block", "enc_layers", "dec_layers", "dim_feedforward"),
            *("hidden_dim", "nheads", "num_queries", "shortest_edge", "longest_edge", "batch_size", "epochs"),
            *("max_train_samples", "max_eval_samples", "max_steps", "lr_drop", "gradient_accumulation_steps"),
            *("checkpointing_steps", "log_every", "save_every", "eval_steps"),
        )
        at_least_zero = (
            *("set_cost_class", "set_cost_bbox", "set_cost_giou", "bbox_loss_coef", "giou_loss_coef", "eos_coef"),
            *("num_workers", "lr", "lr_backbone", "weight_decay", "clip_max_norm", "warmup_steps", "seed"),
            *("eval_every", "save_top_k", "dropout"),
        )
        for names, least in ((at_least_one, 1), (at_least_zero, 0)):
            for name in names:
                value = getattr(self, name)
                if value is not None and not value >= least:
                    raise ValueError(f"--{name} must be at least {least}, not {value}.")
        if self.shortest_edge and self.longest_edge and self.shortest_edge > self.longest_edge:
            raise ValueError(f"--shortest_edge {self.shortest_edge} exceeds --longest_edge {self.longest_edge}.")

    def given(self, *names: str) -> list[str]:
        """Those of the named options that differ from their default."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def _refuse(self, names: Sequence[str], reason: str) -> None:
        if given := self.given(*names):
            raise ValueError(f"{', '.join('--' + name for name in given)}: {reason}")

    def _check_data(self) -> None:
        if self.cache_images and self.num_workers:
            raise ValueError(
                f"--cache_images keeps images in the training process, but --num_workers {self.num_workers} would "
                "load them in others that end with every epoch; give --num_workers 0 or no --cache_images."
            )

    def _check_model(self) -> None:
        if self.multiscale:
            self._refuse(["downsample_factor"], "--multiscale always takes the strides 8, 16 and 32.")
        if self.no_pretrained_backbone:
            self._refuse(["pretrained_backbone"], "contradicts --no_pretrained_backbone.")
        for setting in self.config or []:
            if not setting.partition("=")[1]:
                raise ValueError(f"--config {setting}: write FIELD=VALUE, such as --config dropout=0.1.")
        if self.model is not None:
            reason = f"describes a new model, but --model {self.model} brings its own architecture."
            self._refuse(ONLY_NEW_MODEL, reason)
            return
        self.check_architecture(self.architecture)
        if self.architecture == "detr" and self.downsample_factor == 4:
            raise ValueError("--downsample_factor 4 is too fine for --architecture detr; use 8, 16 or 32.")
        if self.architecture == "deperceiver" and self.no_aux_loss:
            self._refuse(["dec_layers"], "--no_aux_loss trains the decoder of a single cross-attention.")

    def check_architecture(self, architecture: str) -> None:
        """Refuse options that mean nothing to an architecture.

        Raises:
            ValueError: Names the options, and where they apply.
        """
        for names, takers in TAKEN_BY.items():
            if architecture not in takers:
                listed = " or ".join(", ".join(takers).rsplit(", ", 1))
                self._refuse(names, f"is an option of --architecture {listed} only.")

    def _check_optimization(self) -> None:
        if self.mixed_precision != "auto":
            self._refuse(["amp", "use_bfloat"], f"contradicts --mixed_precision {self.mixed_precision}.")
        if self.lr_scheduler != "step":
            self._refuse(["lr_drop"], f"is an option of --lr_scheduler step, not of {self.lr_scheduler}.")
        if self.lr_scheduler != "wsd":
            self._refuse(["decay_fraction"], f"is an option of --lr_scheduler wsd, not of {self.lr_scheduler}.")
        if self.decay_fraction is not None and not 0 < self.decay_fraction <= 1:
            raise ValueError(f"--decay_fraction must be more than 0 and at most 1, not {self.decay_fraction}.")
        if self.lr == 0:
            raise ValueError("--lr 0 would train nothing.")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"--max_minutes must be more than 0, not {self.max_minutes}.")

    def _check_run(self) -> None:
        known = {"none", *(str(kind.value) for kind in LoggerType)}
        if unknown := sorted(set(self.report_to) - known):
            raise ValueError(f"--report_to {' '.join(unknown)}: choose from {', '.join(sorted(known))}.")
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError("--report_to none cannot be combined with a tracker.")
        try:
            areas_of_sizes(self.size_boundaries)
        except ValueError as error:
            raise ValueError(f"--{error}") from error
        if self.overwrite_output_dir and self.resume is not None:
            raise ValueError("--overwrite_output_dir would delete what --resume continues; give one of them.")
        if self.eval_steps is not None:
            self._refuse(["eval_every"], "counts epochs, --eval_steps counts steps; give one of them.")
        if self.output_dir is None:
            self.output_dir = f"outputs/{self.run_name}"


# Options that describe a model that is not there yet.
ONLY_NEW_MODEL = (
    *("architecture", "preset", "config", "backbone", "pretrained_backbone", "no_pretrained_backbone"),
    *("downsample_factor", "multiscale", "dilation", "position_embedding", "num_latents", "enc_blocks"),
    *("enc_layers_per_block", "enc_layers", "dec_layers", "dim_feedforward", "hidden_dim", "nheads", "no_aux_loss"),
)

# Architectures that an option applies to; every other option applies to all.
TAKEN_BY: dict[tuple[str, ...], tuple[str, ...]] = {
    ("num_latents", "enc_blocks", "enc_layers_per_block"): ("deperceiver",),
    ("preset",): ("deperceiver_v2",),
    ("multiscale",): ("deperceiver", "deperceiver_v2"),
    ("downsample_factor", "dilation"): ("deperceiver", "deperceiver_v2", "detr"),
    ("eos_coef",): ("deperceiver", "detr"),  # the others have no class "no object"
    ("position_embedding", "no_aux_loss"): ("deperceiver", "detr", "deformable_detr"),
    ("enc_layers", "dim_feedforward"): ("detr", "deformable_detr", "rt_detr_v2", "d_fine"),
    ("gradient_checkpointing",): ("deperceiver", "deperceiver_v2", "detr", "deformable_detr"),
}


def make_parser(**options: Any) -> HfArgumentParser:
    """The parser of the training command, one argument group for each dataclass above; options are argparse's."""
    groups = [ModelOptions, DataOptions, OptimizationOptions, RunOptions]
    return HfArgumentParser(
        groups,
        description="Train DePerceiver, or another detector for comparison. Starts plainly or by `accelerate launch`.",
        usage="%(prog)s [options]",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        **options,
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> TrainingOptions:
    """Options from a command line (`sys.argv` by default); ends the program with code 2 if they make no sense."""
    parser = make_parser()
    namespace = parser.parse_args(arguments)
    try:
        return TrainingOptions(**vars(namespace))
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that say something; those of switches and of options that are not given do not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)
