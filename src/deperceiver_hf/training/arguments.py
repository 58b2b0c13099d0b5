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


def _option(help_text: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass
class ModelOptions:
    _argument_group_name = "model"

    architecture: Literal["deperceiver", "detr"] = _option(
        "detr trains transformers' DETR with the same backbone, loss, data and schedule, for comparison.",
        "deperceiver",
    )
    model: str | None = _option("Start from this saved model (directory or Hub id) instead of a new one.")
    backbone: str | None = _option("Name of a timm model that returns feature maps; resnet50 if not given.")
    pretrained_backbone: str | None = _option(
        "Weights a new model's backbone starts from: a timm model with its tag, or a local file. "
        "By default the ImageNet weights of the backbone (resnet50.tv_in1k for resnet50)."
    )
    no_pretrained_backbone: bool = _option("Start the backbone of a new model from random weights.", False)
    downsample_factor: Literal[4, 8, 16, 32] | None = _option(
        "Pixels per cell of the feature map that the tokens come from; 32 if not given."
    )
    multiscale: bool = _option("Take tokens from the feature maps of strides 8, 16 and 32 together.", False)
    dilation: bool = _option("Dilate the last stage of the backbone instead of striding it (DC5).", False)
    position_embedding: Literal["sine", "learned"] | None = _option("Kind of position encoding; sine if not given.")
    num_latents: int | None = _option("Length of the latent array; 1024 if not given (the paper: 2048).")
    enc_blocks: int | None = _option("Passes through the encoder's shared self-attention layers; 3 if not given.")
    enc_layers_per_block: int | None = _option("Self-attention layers in one such pass; 6 if not given.")
    enc_layers: int | None = _option("Encoder layers of DETR; 6 if not given.")
    dec_layers: int | None = _option(
        "Decoder layers; 3 if not given, 6 for DETR. A DePerceiver with --no_aux_loss has one cross-attention instead."
    )
    dim_feedforward: int | None = _option("Hidden width of DETR's MLPs; 2048 if not given.")
    hidden_dim: int | None = _option("Width of tokens, latents and queries; 256 if not given.")
    nheads: int | None = _option("Heads of self-attention (of every attention in DETR); 8 if not given.")
    dropout: float | None = _option(
        "Dropout everywhere; if not given, 0.1 in DETR and in the decoder of several layers, 0 elsewhere."
    )
    num_queries: int | None = _option("Object queries, the most objects found in an image; 100 if not given.")
    no_aux_loss: bool = _option(
        "Loss after the last decoder layer only; a DePerceiver has one cross-attention then.", False
    )
    set_cost_class: float | None = _option("Weight of the class probability in the matching; 1 if not given.")
    set_cost_bbox: float | None = _option("Weight of the L1 distance in the matching; 5 if not given.")
    set_cost_giou: float | None = _option("Weight of the generalised IoU in the matching; 2 if not given.")
    bbox_loss_coef: float | None = _option("Weight of the L1 distance in the loss; 5 if not given.")
    giou_loss_coef: float | None = _option("Weight of the generalised IoU in the loss; 2 if not given.")
    eos_coef: float | None = _option("Weight of the no-object class in the cross entropy; 0.1 if not given.")
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
    augmentation: Literal["original", "flip", "none"] = _option(
        "original: flip, random resize and crop, as DETR; flip: flip only; none: images as they are.", "original"
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
    lr_scheduler: Literal["step", "constant", "linear", "cosine"] = _option(
        "step divides the rate by 10 every --lr_drop epochs; linear and cosine fall to 0 at the end.", "step"
    )
    lr_drop: int | None = _option("Epochs between two drops of the rate; 33 if not given.")
    warmup_steps: int = _option("Optimizer steps over which the rate rises from 0.", 0)
    gradient_accumulation_steps: int = _option("Batches whose gradients are averaged into one optimizer step.", 1)
    amp: bool = _option("Mixed precision in float16 (in bfloat16 with --use_bfloat).", False)
    use_bfloat: bool = _option("Mixed precision in bfloat16.", False)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _option(
        "The same by name; without any of the three, what `accelerate launch` was told."
    )
    seed: int = _option("Seed of weights, order, augmentation and dropout.", 42)

    @property
    def precision(self) -> str | None:
        """`"no"`, `"fp16"`, `"bf16"`, or `None` to leave it to accelerate's own configuration."""
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
    save_top_k: int = _option("How many models of the highest AP to keep.", 3)
    save_every: int = _option("Epochs between two savings of the training state.", 1)
    checkpointing_steps: int | None = _option("Save the training state every so many steps, besides after epochs.")
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
        self._check_model()
        self._check_optimization()
        self._check_run()

    def _check_ranges(self) -> None:
        at_least_one = (
            *("num_latents", "enc_blocks", "enc_layers_per_block", "enc_layers", "dec_layers", "dim_feedforward"),
            *("hidden_dim", "nheads", "num_queries", "shortest_edge", "longest_edge", "batch_size", "epochs"),
            *("max_train_samples", "max_eval_samples", "max_steps", "lr_drop", "gradient_accumulation_steps"),
            *("checkpointing_steps", "log_every", "save_every"),
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

    def _check_model(self) -> None:
        if self.multiscale:
            self._refuse(["downsample_factor"], "--multiscale always takes the strides 8, 16 and 32.")
        if self.no_pretrained_backbone:
            self._refuse(["pretrained_backbone"], "contradicts --no_pretrained_backbone.")
        if self.model is not None:
            saved = (*ONLY_NEW_MODEL, *ONLY_DEPERCEIVER, *ONLY_DETR)
            self._refuse(saved, f"describes a new model, but --model {self.model} brings its own architecture.")
        elif self.architecture == "detr":
            self._refuse(ONLY_DEPERCEIVER, "is an option of --architecture deperceiver only.")
            if self.downsample_factor == 4:
                raise ValueError("--downsample_factor 4 is too fine for --architecture detr; use 8, 16 or 32.")
        else:
            self._refuse(ONLY_DETR, "is an option of --architecture detr only.")
            if self.no_aux_loss:
                self._refuse(["dec_layers"], "--no_aux_loss trains the decoder of a single cross-attention.")

    def _check_optimization(self) -> None:
        if self.mixed_precision is not None:
            self._refuse(["amp", "use_bfloat"], f"contradicts --mixed_precision {self.mixed_precision}.")
        if self.lr_scheduler != "step":
            self._refuse(["lr_drop"], f"is an option of --lr_scheduler step, not of {self.lr_scheduler}.")
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
        if self.overwrite_output_dir and self.resume is not None:
            raise ValueError("--overwrite_output_dir would delete what --resume continues; give one of them.")
        if self.output_dir is None:
            self.output_dir = f"outputs/{self.run_name}"


# Options of `ModelOptions` by where they apply; the others apply to every model.
ONLY_NEW_MODEL = (
    *("architecture", "backbone", "pretrained_backbone", "no_pretrained_backbone", "downsample_factor", "dilation"),
    *("position_embedding", "hidden_dim", "nheads", "dec_layers", "no_aux_loss"),
)
ONLY_DEPERCEIVER = ("multiscale", "num_latents", "enc_blocks", "enc_layers_per_block")
ONLY_DETR = ("enc_layers", "dim_feedforward")


def make_parser() -> HfArgumentParser:
    """The parser of the training command, one argument group for each dataclass above."""
    groups = [ModelOptions, DataOptions, OptimizationOptions, RunOptions]
    return HfArgumentParser(
        groups,
        description="Train DePerceiver, or DETR for comparison. Starts plainly or by `accelerate launch`.",
        usage="%(prog)s [options]",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> TrainingOptions:
    """Options from a command line (`sys.argv` by default); ends the program with code 2 if they make no sense."""
    parser = make_parser()
    namespace = parser.parse_args(arguments)
    try:
        return TrainingOptions(**vars(namespace))
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something; those of switches and of options that are not given do not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)
