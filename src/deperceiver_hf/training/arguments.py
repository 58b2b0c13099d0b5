# SPDX-License-Identifier: Apache-2.0
"""Options of a training run, under the original's names where they keep their meaning (`docs/original_flags.md`).

Four groups of options, each a dataclass, make up the one flat `TrainingOptions`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from accelerate.utils import LoggerType
from transformers import HfArgumentParser

from ..data.boxes import BOX_FORMATS
from ..data.dataset import BAD_IMAGE_POLICIES
from ..data.formats import FORMATS
from ..data.transforms import AUGMENTATIONS
from ..errors import UserError
from ..evaluation.coco_metric import COCO_SIZE_BOUNDARIES, areas_of_sizes
from ..machine import PRECISIONS
from ..output_files import expand_home
from .architectures import ARCHITECTURES, ModelOptions
from .architectures.options import DEFAULT_IMAGE_SIZE
from .declaration import Options, declared, option

AUTOMATIC: Any = "auto"  # in the place of a number that the run chooses
DEFAULT_DECAY_FRACTION = 0.4
DEFAULT_PLAIN_FRACTION = 0.2


@dataclass
class DataOptions(Options):
    _argument_group_name = "data"

    dataset: str = option(
        "Directory or annotation file of COCO, YOLO (data.yaml), Pascal VOC or a CSV of boxes, Hub id or local "
        "`datasets` directory (also with options: 'NAME:config=...,outside=true'), or 'synthetic', also with options: "
        "'synthetic:image_size=128,min_objects=2,max_objects=6,num_samples=500,seed=3'.",
        "synthetic",
        resume_may_change=True,  # a directory may have moved; what is in it is compared
    )
    annotations: str | None = option(
        "Instead of --dataset: the annotation file to train on, or the directory of XML or text files; with --images "
        "where the images are elsewhere.",
        resume_may_change=True,
    )
    images: str | None = option("Directory of the images of --annotations.", resume_may_change=True)
    val_annotations: str | None = option("The same for the evaluation.", resume_may_change=True)
    val_images: str | None = option("Directory of the images of --val_annotations.", resume_may_change=True)
    format: Literal[tuple(FORMATS)] | None = option(  # type: ignore[valid-type]
        "Format of the annotations, where the files do not tell.", resume_may_change=True
    )
    train_split: str = option("Split to train on.", "train")
    eval_split: str = option("Split to evaluate on.", "val")
    val_fraction: float | None = option(
        "Evaluate on this part of the training split, such as 0.1, and train on the rest. It is drawn by chance, "
        "near-duplicates on one side; train_images.txt and val_images.txt in the output directory name both sides.",
    )
    val_seed: int | None = option("Seed of --val_fraction; 42 if not given, whatever --seed is.", at_least=0)
    train_list: str | None = option(
        "Text file that names the images of the training split to train on, one in a line; the others are for the "
        "evaluation.",
        resume_may_change=True,  # which images are on which side is compared
    )
    val_list: str | None = option(
        "Text file that names the images of the training split to evaluate on; without --train_list, the others are "
        "trained on.",
        resume_may_change=True,
    )
    box_format: Literal[BOX_FORMATS] | None = option(  # type: ignore[valid-type]
        "How the data's files write boxes. xywh: left, top, width, height, as in COCO (if not given); xyxy: left, "
        "top, right, bottom; cxcywh: centre, width, height; all in pixels, or in parts of the image with _relative (0 "
        "to 1), _percent (0 to 100) or _permille (0 to 1000).",
    )
    shortest_edge: int | None = option(
        "Size of the shortest edge in evaluation and inference, and the largest in training; 800 if not given.",
        at_least=1,
    )
    longest_edge: int | None = option("Limit of the longest edge; 1333 if not given.", at_least=1)
    fixed_size: list[int] | None = field(
        default=None,
        metadata=declared(
            "Height and width that every image is resized to, whatever its own ratio, instead of the edges: for "
            "models that take no padding.",
            metavar=("HEIGHT", "WIDTH"),
        ),
    )
    augmentation: Literal[AUGMENTATIONS] = option(  # type: ignore[valid-type]
        "original: flip, random resize and crop, as DETR; flip: flip only; none: images as they are; crop: flip, mild "
        "crop and change of colours, always at full size; crop_any_orientation: the same for images without an up.",
        "original",
    )
    mosaic: float | None = option(
        "Probability (0 to 1) that a training image becomes a quarter of a mosaic of four; 0 if not given.", at_least=0
    )
    mixup: float | None = option(
        "Probability (0 to 1) that a training image is blended with another one, with the objects of both; 0 if not "
        "given.",
        at_least=0,
    )
    plain_fraction: float | None = option(
        "Last part of the training (0 to 1), by steps or by --max_minutes, without --mosaic and --mixup; 0.2 if not "
        "given.",
        at_least=0,
    )
    repeat_factor_threshold: float | None = option(
        "Take images with rare classes more often: a class that is on less than this part of the images (such as 0.1; "
        "0 to 1) by the square root of how many times less. The epochs become longer.",
    )
    cache_images: bool = option(
        "Keep decoded images in memory, 3 bytes a pixel, for small data sets; needs --num_workers 0.",
        False,
        resume_may_change=True,
    )
    cache_features: bool = option(
        "Keep the feature maps of a frozen backbone (--lr_backbone 0) in memory, of every image as it was augmented: "
        "pays with a fixed size and --augmentation flip or none.",
        False,
    )
    batch_size: int = option(
        "Images in a batch of one process; auto: as many of --images_per_step as fit into memory, the rest in further "
        "batches of the same step.",
        2,
        at_least=1,
    )
    num_workers: int = option(
        "Processes that load images, for each training process.", 2, at_least=0, resume_may_change=True
    )
    group_by_aspect_ratio: bool = option("Make batches of images that are all wide or all tall.", False)
    on_bad_image: Literal[BAD_IMAGE_POLICIES] = option(  # type: ignore[valid-type]
        "What becomes of images that are missing or cannot be read. skip: they are left out, those that break while "
        "training are replaced by others, and the log says which; stop: the run ends.",
        "skip",
        resume_may_change=True,
    )
    max_image_pixels: int | None = option(
        "Images of more pixels cannot be read: a small file may hold one that fills the memory; 178,956,970 if not "
        "given.",
        at_least=1,
        resume_may_change=True,
    )
    max_train_samples: int | None = option("Train on the first images only.", at_least=1)
    max_eval_samples: int | None = option("Evaluate on the first images only.", at_least=1, resume_may_change=True)

    @property
    def mixes_images(self) -> bool:
        """Whether training images are made of several."""
        return bool(self.mosaic or self.mixup)

    @property
    def has_automatic_batch_size(self) -> bool:
        """Whether the run is still to choose its batch size."""
        return self.batch_size == AUTOMATIC

    def image_size(self, default: dict[str, int] = DEFAULT_IMAGE_SIZE) -> dict[str, int]:
        """Shortest and longest edge of the images, or height and width if they are fixed; what options do not give is
        that of `default`.

        Raises:
            ValueError: The longest edge would be less than the shortest.
        """
        if self.fixed_size is not None:
            return dict(zip(("height", "width"), self.fixed_size, strict=True))
        size = dict(default)
        if self.shortest_edge is not None:
            ratio = DEFAULT_IMAGE_SIZE["longest_edge"] / DEFAULT_IMAGE_SIZE["shortest_edge"]
            size = {"shortest_edge": self.shortest_edge, "longest_edge": round(ratio * self.shortest_edge)}
        if self.longest_edge is not None:
            size["longest_edge"] = self.longest_edge
        if size["shortest_edge"] > size["longest_edge"]:
            raise UserError(
                f"--longest_edge {size['longest_edge']} is less than the shortest edge of {size['shortest_edge']}; "
                f"give a smaller --shortest_edge too."
            )
        return size


@dataclass
class OptimizationOptions(Options):
    _argument_group_name = "optimization"

    lr: float = option("Learning rate.", 1e-4, at_least=0, comparison_hint="give --lrs, or lr=... in --models")
    lr_backbone: float = option("Learning rate of the backbone; 0 freezes it.", 1e-5, at_least=0)
    optimizer: Literal["adamw", "muon"] | None = option(
        "muon: Muon for the weights of linear layers, AdamW for all else; adamw, if not given, for all."
    )
    weight_decay: float = option("Weight decay, decoupled as in AdamW.", 1e-4, at_least=0)
    clip_max_norm: float = option("Clip the gradient to this norm; 0 does not clip.", 0.1, at_least=0)
    epochs: int = option(
        "Passes over the training set.",
        50,
        at_least=1,
        resume_may_change=True,
        comparison_hint="give --steps or --minutes",
    )
    max_steps: int | None = option(
        "Stop after this many optimizer steps even if epochs remain.",
        at_least=1,
        resume_may_change=True,
        comparison_hint="give --steps",
    )
    max_minutes: float | None = option(
        "Stop after this much training even if steps remain.", resume_may_change=True, comparison_hint="give --minutes"
    )
    ema_decay: float | None = option(
        "Evaluate and save an exponential moving average of the weights that keeps this part of itself in a step, "
        "such as 0.999 (less in the first steps); if not given, the weights themselves.",
        at_least=0,
    )
    lr_scheduler: Literal["step", "constant", "linear", "cosine", "wsd"] = option(
        "step divides the rate by 10 every --lr_drop epochs; linear and cosine fall to 0 at the end, which is that of "
        "the steps or of --max_minutes, whichever is nearer; wsd is constant and falls linearly over the last part.",
        "step",
    )
    lr_drop: int | None = option("Epochs between two drops of the rate; 33 if not given.", at_least=1)
    decay_fraction: float | None = option("Part of the training in which wsd falls to 0; 0.4 if not given.")
    warmup_steps: int = option("Optimizer steps over which the rate rises from 0.", 0, at_least=0)
    gradient_accumulation_steps: int = option(
        "Batches whose gradients are averaged into one optimizer step.", 1, at_least=1
    )
    images_per_step: int | None = option(
        "Images of one process in an optimizer step, with --batch_size auto; as many as in the recipe, or 16, if not "
        "given.",
        at_least=1,
    )
    # Of a resumed run, what these three lead to is compared.
    amp: bool = option("Mixed precision in float16 (in bfloat16 with --use_bfloat).", False, resume_may_change=True)
    use_bfloat: bool = option("Mixed precision in bfloat16.", False, resume_may_change=True)
    mixed_precision: Literal[("auto", *PRECISIONS)] = option(  # type: ignore[valid-type]
        "The same by name. auto: what `accelerate launch` was told, else bfloat16 where the hardware computes in it, "
        "float16 on older CUDA devices, float32 elsewhere.",
        "auto",
        resume_may_change=True,
    )
    seed: int = option(
        "Seed of weights, order, augmentation and dropout.", 42, at_least=0, comparison_hint="give --seeds"
    )

    @property
    def precision(self) -> str:
        """`"no"`, `"fp16"`, `"bf16"` or `"auto"`, see [`~deperceiver_hf.machine.choose_precision`]."""
        if self.use_bfloat:
            return "bf16"
        return "fp16" if self.amp else self.mixed_precision

    @property
    def freeze_backbone(self) -> bool:
        """Whether no parameter of the backbone is trained."""
        return self.lr_backbone == 0


@dataclass
class RunOptions(Options):
    _argument_group_name = "run"

    output_dir: str | None = option(
        "Where everything is written; outputs/RUN_NAME if not given.", resume_may_change=True, harmless=True
    )
    run_name: str = option(
        "Name of the run, for its directory and its trackers.",
        "deperceiver",
        resume_may_change=True,
        harmless=True,
        comparison_hint="runs have the names of the models",
    )
    project: str = option("Name of the project in trackers.", "deperceiver", resume_may_change=True, harmless=True)
    overwrite_output_dir: bool = option(
        "Delete what an earlier run left in the output directory.",
        False,
        resume_may_change=True,
        harmless=True,
        comparison_hint="delete the directory, or take another one",
    )
    resume: str | None = option(
        "Continue from a training state, or from the newest in the output directory with 'auto' (which starts anew "
        "if there is none).",
        resume_may_change=True,
        harmless=True,
        comparison_hint="runs are resumed by themselves",
    )
    eval_every: int = option("Epochs between evaluations; 0 evaluates never.", 1, at_least=0, resume_may_change=True)
    eval_steps: int | None = option(
        "Evaluate every so many optimizer steps instead, and at the end.", at_least=1, resume_may_change=True
    )
    eval_without_ema: bool = option(
        "With --ema_decay, evaluate the weights themselves, too, in each evaluation.", False, resume_may_change=True
    )
    early_stopping_patience: int | None = option(
        "End the training after so many evaluations in a row without a better AP; with --lr_scheduler wsd the rate "
        "then decays first.",
        at_least=1,
        resume_may_change=True,
        comparison_hint="every model has the budget of --steps or --minutes",
    )
    early_stopping_threshold: float = option(
        "What an AP (0 to 1) must exceed the best one by to count as better, with --early_stopping_patience.",
        0.0,
        at_least=0,
        resume_may_change=True,
    )
    save_top_k: int = option(
        "How many models of the highest AP to keep.",
        3,
        at_least=0,
        resume_may_change=True,
        comparison_hint="only the last model of a run is kept",
    )
    save_every: int = option(
        "Epochs between two savings of the training state.", 1, at_least=1, resume_may_change=True, harmless=True
    )
    checkpointing_steps: int | None = option(
        "Save the training state every so many steps, besides after epochs.",
        at_least=1,
        resume_may_change=True,
        harmless=True,
    )
    size_boundaries: list[float] = field(
        default_factory=lambda: list(COCO_SIZE_BOUNDARIES),
        metadata=declared(
            "Sides of squares, in pixels of the data, whose areas part small, medium and large objects.",
            metavar=("SMALL", "MEDIUM"),
            resume_may_change=True,
        ),
    )
    log_every: int = option(
        "Optimizer steps between two lines of the log.", 50, at_least=1, resume_may_change=True, harmless=True
    )
    pictures: int = option(
        "Validation images to draw at each evaluation with predictions beside the truth, in predictions/ and for the "
        "trackers; with 0, curves.png is not drawn either.",
        16,
        at_least=0,
        resume_may_change=True,
        harmless=True,
        comparison_hint="a comparison draws what its report shows",
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata=declared(
            "Trackers of accelerate, such as tensorboard or wandb; none: files in the output directory only.",
            resume_may_change=True,
            harmless=True,
        ),
    )


# The groups come in this order, the model's last: what an architecture has to know of a training, `freeze_backbone`
# and `image_size`, is that of the groups before.
@dataclass
class TrainingOptions(RunOptions, OptimizationOptions, DataOptions, ModelOptions):
    """All options of a training run; a combination that makes no sense raises `ValueError` when it is made."""

    @property
    def data_name(self) -> str:
        """What is trained on, by the name that the user gave it."""
        return self.dataset if self.annotations is None else self.annotations

    @property
    def divides_a_split(self) -> bool:
        """Whether the images to evaluate on are some of the training split."""
        return any(value is not None for value in (self.val_fraction, self.train_list, self.val_list))

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates at any time."""
        return bool(self.eval_every or self.eval_steps)

    @property
    def directory(self) -> str:
        """Where everything is written."""
        return self.output_dir or f"outputs/{self.run_name}"

    def __post_init__(self) -> None:
        paths = ("annotations", "images", "val_annotations", "val_images", "train_list", "val_list")
        for name in ("output_dir", "resume", "model", "start_from", "pretrained_backbone", *paths):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, expand_home(path))
        self.check_ranges()
        self._check_data()
        self._check_architecture_is_known()
        self.check_model()
        self._check_optimization()
        self._check_run()

    def _check_architecture_is_known(self) -> None:
        if self.architecture is not None and self.architecture not in ARCHITECTURES:
            raise UserError(f"--architecture {self.architecture}: choose from {', '.join(ARCHITECTURES)}.")

    def _check_data(self) -> None:
        self._check_sources()
        if self.shortest_edge and self.longest_edge and self.shortest_edge > self.longest_edge:
            raise UserError(f"--shortest_edge {self.shortest_edge} exceeds --longest_edge {self.longest_edge}.")
        if self.fixed_size is not None:
            if len(self.fixed_size) != 2 or min(self.fixed_size) < 1:
                given = " ".join(map(str, self.fixed_size))
                raise UserError(f"--fixed_size {given}: give a height and a width of at least 1 pixel.")
            self.refuse(["shortest_edge", "longest_edge"], "images have the height and width of --fixed_size.")
        if self.cache_features and self.lr_backbone:
            raise UserError("--cache_features keeps what a frozen backbone makes of an image: give --lr_backbone 0.")
        if self.has_automatic_batch_size:
            self.refuse(["gradient_accumulation_steps"], "--batch_size auto decides it; give --images_per_step.")
        else:
            self.refuse(["images_per_step"], "belongs to --batch_size auto.")
        for name in ("mosaic", "mixup", "plain_fraction"):
            if (getattr(self, name) or 0) > 1:
                raise UserError(f"--{name} is a part of 1, not {getattr(self, name)}.")
        if not self.mixes_images:
            self.refuse(["plain_fraction"], "ends --mosaic and --mixup, and neither is given.")
        if self.mixes_images and self.cache_features:
            raise UserError("--cache_features needs images that come again, which --mosaic and --mixup do not make.")
        if self.repeat_factor_threshold is not None and not 0 < self.repeat_factor_threshold <= 1:
            raise UserError(
                f"--repeat_factor_threshold must be more than 0 and at most 1, not {self.repeat_factor_threshold}."
            )
        if self.cache_images and self.num_workers:
            raise UserError(
                f"--cache_images keeps images in the training process, but --num_workers {self.num_workers} would "
                "load them in others that end with every epoch; give --num_workers 0 or no --cache_images."
            )

    def _check_sources(self) -> None:
        if self.annotations is not None:
            self.refuse(
                ["dataset"], f"stands for both splits; --annotations {self.annotations} is what is trained on."
            )
        for images, annotations in (("images", "annotations"), ("val_images", "val_annotations")):
            if getattr(self, annotations) is None:
                self.refuse([images], f"is where the images of --{annotations} are, which is not given.")
        if self.annotations is None:
            self.refuse(["val_annotations"], "goes with --annotations, not with --dataset.")
        if self.val_fraction is not None:
            self.refuse(["train_list", "val_list", "val_annotations"], "says what is evaluated on; no --val_fraction.")
            if not 0 < self.val_fraction < 1:
                raise UserError(f"--val_fraction must be more than 0 and less than 1, not {self.val_fraction}.")
        else:
            self.refuse(["val_seed"], "is the seed of --val_fraction, which is not given.")
        if self.divides_a_split:
            self.refuse(["eval_split", "val_annotations"], "contradicts --train_list or --val_fraction or --val_list.")

    def _check_optimization(self) -> None:
        if self.mixed_precision != "auto":
            self.refuse(["amp", "use_bfloat"], f"contradicts --mixed_precision {self.mixed_precision}.")
        if self.lr_scheduler != "step":
            self.refuse(["lr_drop"], f"is an option of --lr_scheduler step, not of {self.lr_scheduler}.")
        if self.lr_scheduler != "wsd":
            self.refuse(["decay_fraction"], f"is an option of --lr_scheduler wsd, not of {self.lr_scheduler}.")
        if self.decay_fraction is not None and not 0 < self.decay_fraction <= 1:
            raise UserError(f"--decay_fraction must be more than 0 and at most 1, not {self.decay_fraction}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"--ema_decay must be more than 0 and less than 1, not {self.ema_decay}.")
        if self.eval_without_ema and self.ema_decay is None:
            raise UserError("--eval_without_ema compares with the average of --ema_decay, which is not given.")
        if self.lr == 0:
            raise UserError("--lr 0 would train nothing.")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise UserError(f"--max_minutes must be more than 0, not {self.max_minutes}.")

    def _check_run(self) -> None:
        known = {"none", *(str(kind.value) for kind in LoggerType)}
        if unknown := sorted(set(self.report_to) - known):
            raise UserError(f"--report_to {' '.join(unknown)}: choose from {', '.join(sorted(known))}.")
        if "none" in self.report_to and len(self.report_to) > 1:
            raise UserError("--report_to none cannot be combined with a tracker.")
        try:
            areas_of_sizes(self.size_boundaries)
        except ValueError as error:
            raise UserError(f"--{error}") from error
        if self.overwrite_output_dir and self.resume is not None:
            raise UserError("--overwrite_output_dir would delete what --resume continues; give one of them.")
        if self.eval_steps is not None:
            self.refuse(["eval_every"], "counts epochs, --eval_steps counts steps; give one of them.")
        self._check_early_stopping()
        self.output_dir = self.directory

    def _check_early_stopping(self) -> None:
        if self.early_stopping_patience is None:
            self.refuse(["early_stopping_threshold"], "belongs to --early_stopping_patience, which is not given.")
        elif not (self.eval_every or self.eval_steps):
            raise UserError("--early_stopping_patience counts evaluations, but --eval_every 0 makes none.")
        elif self.decay_fraction == 1:
            raise UserError(
                "--early_stopping_patience ends the constant part of wsd, but --decay_fraction 1 leaves none."
            )


def make_parser(**options: Any) -> HfArgumentParser:
    """The parser of the training command, one argument group for each dataclass above; options are argparse's."""
    # Which architectures there are is known here only: their modules need the options themselves.
    model_options = ModelOptions.for_parser(architecture=Literal[tuple(ARCHITECTURES)] | None)
    data_options = DataOptions.for_parser(batch_size=_number_or_auto)
    return HfArgumentParser(
        [model_options, data_options, *(group.for_parser() for group in (OptimizationOptions, RunOptions))],
        description="Train DePerceiver, or another detector for comparison. Starts plainly or by `accelerate launch`.",
        usage="%(prog)s [options]",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        **options,
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> TrainingOptions:  # type: ignore[return]
    """Options from a command line (`sys.argv` by default); ends the program with code 2 if they make no sense."""
    parser = make_parser()
    namespace = parser.parse_args(arguments)
    try:
        return TrainingOptions(**vars(namespace))
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def _number_or_auto(text: str) -> Any:
    if text == AUTOMATIC:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor {AUTOMATIC}") from None


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that say something; those of switches and of options that are not given do not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)
