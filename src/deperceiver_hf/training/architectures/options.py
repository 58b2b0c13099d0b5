# SPDX-License-Identifier: Apache-2.0
"""The options that describe a model, whether it is to be trained or only to be looked at.

They default to `None`, "not given": only so can an option that an architecture or a saved model does not take be
refused.
"""

from dataclasses import dataclass, field
from typing import Literal

from ...errors import UserError
from ..declaration import Options, declared, listed, option

DEFAULT_ARCHITECTURE = "deperceiver_v2"
DEFAULT_IMAGE_SIZE = {"shortest_edge": 800, "longest_edge": 1333}
# What a detector to start from decides.
BROUGHT_BY_DETECTOR = (
    *("backbone", "pretrained_backbone", "no_pretrained_backbone"),
    *("downsample_factor", "multiscale", "dilation"),
)
WITH_OWN_BACKBONE = ("lw_detr", "rf_detr")
WITH_ENCODER = ("detr", "deformable_detr", "rt_detr_v2", "d_fine", "deimv2")
OF_TRANSFORMERS = (*WITH_ENCODER, *WITH_OWN_BACKBONE)


@dataclass
class ModelOptions(Options):
    """What a model is. One that makes no sense raises `ValueError` when it is made."""

    _argument_group_name = "model"

    architecture: str | None = option(
        f"Kind of model; {DEFAULT_ARCHITECTURE} if not given. deperceiver is the original's. "
        f"{listed(OF_TRANSFORMERS, 'and')} train transformers' models on the same backbone, data and schedule, for "
        "comparison: detr with DePerceiver's loss, the others with their own; "
        f"{listed(WITH_OWN_BACKBONE, 'and')} have a kind of backbone of their own.",
        comparison_hint="name it in --models",
    )
    preset: str | None = option(
        "Size of the model: nano, lite, small, base or large; base if not given.",
        of=("deperceiver_v2",),
        new_model_only=True,
    )
    config: list[str] | None = field(
        default=None,
        metadata=declared(
            "Fields of the new model's configuration as FIELD=VALUE, the value in JSON or a plain string; they win "
            "over all other options.",
            new_model_only=True,
        ),
    )
    model: str | None = option(
        "Start from this saved model (directory or Hub id) instead of a new one.",
        comparison_hint="write model=... in --models",
    )
    backbone: str | None = option(
        "Name of a timm model that returns feature maps; if not given, the preset's in deperceiver_v2, resnet50 "
        "elsewhere. lw_detr and rf_detr have a backbone of their own, a vision transformer with windows: they take "
        "measures and weights from a plain one, vit_tiny_patch16_224 and vit_small_patch14_dinov2 if not given.",
        new_model_only=True,
    )
    pretrained_backbone: str | None = option(
        "Weights a new model's backbone starts from: a timm model with its tag, or a local file. "
        "By default the ImageNet weights of the backbone (resnet50.tv_in1k for resnet50).",
        new_model_only=True,
    )
    no_pretrained_backbone: bool = option(
        "Start the backbone of a new model from random weights.", False, new_model_only=True
    )
    start_from: str | None = option(
        "Start from the backbone and encoder of another detector (directory or Hub id of an RT-DETR, RT-DETRv2, "
        "D-FINE, DEIMv2, LW-DETR, RF-DETR, Deformable DETR or DETR), with its weights and its image processor; "
        "classes, queries and decoder are new.",
        of=("deperceiver_v2",),
        new_model_only=True,
    )
    downsample_factor: Literal[4, 8, 16, 32] | None = option(
        "Pixels per cell of the feature map that the tokens come from; if not given, the preset's in deperceiver_v2, "
        "32 elsewhere.",
        of=("deperceiver", "deperceiver_v2", "detr"),
        new_model_only=True,
    )
    multiscale: bool = option(
        "Take tokens from the feature maps of strides 8, 16 and 32 together.",
        False,
        of=("deperceiver", "deperceiver_v2"),
        new_model_only=True,
    )
    dilation: bool = option(
        "Dilate the last stage of the backbone instead of striding it (DC5).",
        False,
        of=("deperceiver", "deperceiver_v2", "detr"),
        new_model_only=True,
    )
    position_embedding: Literal["sine", "learned"] | None = option(
        "Kind of position encoding; sine if not given.",
        of=("deperceiver", "detr", "deformable_detr"),
        new_model_only=True,
    )
    num_latents: int | None = option(
        "Length of the latent array; 1024 if not given (the paper: 2048).",
        at_least=1,
        of=("deperceiver",),
        new_model_only=True,
    )
    enc_blocks: int | None = option(
        "Passes through the encoder's shared self-attention layers; 3 if not given.",
        at_least=1,
        of=("deperceiver",),
        new_model_only=True,
    )
    enc_layers_per_block: int | None = option(
        "Self-attention layers in one such pass; 6 if not given.",
        at_least=1,
        of=("deperceiver",),
        new_model_only=True,
    )
    enc_layers: int | None = option(
        "Encoder layers; if not given, 6 in DETR and Deformable DETR, 1 in RT-DETRv2, D-FINE and DEIMv2.",
        at_least=1,
        of=WITH_ENCODER,
        new_model_only=True,
    )
    dec_layers: int | None = option(
        "Decoder layers; if not given, the preset's in deperceiver_v2, 3 in deperceiver, LW-DETR and RF-DETR, 6 "
        "elsewhere. A deperceiver with --no_aux_loss has one cross-attention instead.",
        at_least=1,
        new_model_only=True,
    )
    dim_feedforward: int | None = option(
        "Hidden width of the MLPs; if not given, 2048 in DETR, LW-DETR and RF-DETR, and 4 times the width elsewhere.",
        at_least=1,
        of=OF_TRANSFORMERS,
        new_model_only=True,
    )
    hidden_dim: int | None = option(
        "Width of tokens, latents and queries; if not given, the preset's in deperceiver_v2, 256 elsewhere.",
        at_least=1,
        new_model_only=True,
    )
    nheads: int | None = option(
        "Heads of self-attention in deperceiver, of every attention elsewhere (twice as many read the features in "
        "LW-DETR and RF-DETR, as in their papers); if not given, the preset's in deperceiver_v2, 8 elsewhere.",
        at_least=1,
        new_model_only=True,
    )
    dropout: float | None = option(
        "Dropout everywhere; if not given, 0.1 in DETR, Deformable DETR and DePerceiver's decoder of several layers, "
        "0 elsewhere.",
        at_least=0,
    )
    num_queries: int | None = option(
        "Object queries, the most objects found in an image; if not given, the preset's in deperceiver_v2, 100 in "
        "deperceiver and DETR, 300 elsewhere.",
        at_least=1,
    )
    no_aux_loss: bool = option(
        "Loss after the last decoder layer only; a DePerceiver has one cross-attention then.",
        False,
        of=("deperceiver", "detr", "deformable_detr", *WITH_OWN_BACKBONE),
        new_model_only=True,
    )
    set_cost_class: float | None = option(
        "Weight of the classification in the matching; if not given, 1 in deperceiver and DETR, 2 elsewhere.",
        at_least=0,
    )
    set_cost_bbox: float | None = option("Weight of the L1 distance in the matching; 5 if not given.", at_least=0)
    set_cost_giou: float | None = option("Weight of the generalised IoU in the matching; 2 if not given.", at_least=0)
    bbox_loss_coef: float | None = option("Weight of the L1 distance in the loss; 5 if not given.", at_least=0)
    giou_loss_coef: float | None = option("Weight of the generalised IoU in the loss; 2 if not given.", at_least=0)
    eos_coef: float | None = option(
        "Weight of the no-object class in the cross entropy; 0.1 if not given.",
        at_least=0,
        of=("deperceiver", "detr"),  # the others have no class "no object"
    )
    attn_implementation: Literal["auto", "eager", "sdpa"] | None = option(
        "How attention is computed in training. auto, also if not given: on a CPU what is found faster by a short "
        "measurement at the start, sdpa elsewhere."
    )
    gradient_checkpointing: bool = option(
        "Recompute activations in the backward pass to save memory.",
        False,
        of=("deperceiver", "deperceiver_v2", "detr", "deformable_detr"),
    )

    def __post_init__(self) -> None:
        self.check_ranges()
        self.check_model()

    # What an architecture has to know of a training; `TrainingOptions` has options for it.

    @property
    def freeze_backbone(self) -> bool:
        """Whether no parameter of the backbone is trained."""
        return False

    def image_size(self, default: dict[str, int] = DEFAULT_IMAGE_SIZE) -> dict[str, int]:
        """Shortest and longest edge of the images that the model is made for."""
        return dict(default)

    def check_model(self) -> None:
        """Refuse options that contradict each other, and choose the architecture of a new model.

        Raises:
            ValueError: Names the options.
        """
        if self.multiscale:
            self.refuse(["downsample_factor"], "--multiscale always takes the strides 8, 16 and 32.")
        if self.no_pretrained_backbone:
            self.refuse(["pretrained_backbone"], "contradicts --no_pretrained_backbone.")
        if self.start_from is not None:
            self.refuse(list(BROUGHT_BY_DETECTOR), f"--start_from {self.start_from} brings its own backbone.")
        for setting in self.config or []:
            if not setting.partition("=")[1]:
                raise UserError(f"--config {setting}: write FIELD=VALUE, such as --config dropout=0.1.")
        if self.model is not None:
            new_model_only = [name for name, facts in self.facts().items() if facts.new_model_only]
            self.refuse(
                new_model_only, f"describes a new model, but --model {self.model} brings its own architecture."
            )
            return
        chosen = self.architecture is not None
        self.architecture = self.chosen_architecture
        self.check_architecture(self.architecture, chosen)
        if self.architecture == "detr" and self.downsample_factor == 4:
            raise UserError("--downsample_factor 4 is too fine for --architecture detr; use 8, 16 or 32.")
        if self.architecture == "deperceiver" and self.no_aux_loss:
            self.refuse(["dec_layers"], "--no_aux_loss trains the decoder of a single cross-attention.")

    @property
    def chosen_architecture(self) -> str:
        """Name of a new model's architecture."""
        return self.architecture or DEFAULT_ARCHITECTURE

    def check_architecture(self, architecture: str, chosen: bool = True) -> None:
        """Refuse options that mean nothing to an architecture.

        Args:
            architecture: Its name.
            chosen: `False` if nothing was said and this is the default.

        Raises:
            ValueError: Names the options, and where they apply.
        """
        takers = {name: facts.of for name, facts in self.facts().items() if facts.of is not None}
        for name in self.given(list(takers)):
            if architecture in takers[name]:
                continue
            reason = f"is an option of --architecture {listed(takers[name], 'or')} only"
            if not chosen:
                other = "" if len(takers[name]) == 1 else ", or another of them"
                reason += f", and the default is {architecture}: add --architecture {takers[name][0]}{other}"
            self.refuse([each for each in takers if takers[each] == takers[name]], f"{reason}.")
