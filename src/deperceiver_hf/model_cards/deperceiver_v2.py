# SPDX-License-Identifier: Apache-2.0
"""The card of a DePerceiver v2."""

import contextlib
import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard

from ..benchmarks.cost import Cost, count_cost
from ..benchmarks.variants import deperceiver_v2_variant, make_detr
from ..data.coco_categories import COCO_CATEGORIES
from ..errors import UserError
from ..evaluation.cards import Evaluation, card_metadata
from ..jobs import plural
from ..models.configuration_deperceiver_v2 import PRESETS, DePerceiverV2Config
from ..models.detector_features_deperceiver_v2 import detector_family
from ..models.modeling_deperceiver_v2 import DePerceiverV2ForObjectDetection
from .tables import IMAGE_SIZE, cost_table, describe_backbone

LOSSES = {
    "focal": "focal loss",
    "varifocal": "varifocal loss, whose target is the IoU of the matched box",
    "mal": "matchability-aware loss, whose target is a power of the IoU of the matched box",
}

ENCODERS = {
    "none": "none",
    "detector": "that of the detector",
    "fusion": "attention among the cells of the coarsest map, then convolutions from coarse to fine and back, "
    "{config.fusion_dim} channels",
}
STEPS = {"relative": "by a part of its sides", "logit": "in logits"}

TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

DePerceiver v2 detects objects as a set, without non-maximum suppression. It is a Perceiver whose latents are the
objects. {% if config.query_selection -%}
The most promising cells of the feature maps become latents, each with a box.
{%- else -%}
They are learned, each with a box.
{%- endif %} In every block the latents attend
to each other, read the feature cells of all scales again and refine their boxes. What follows the backbone costs an
amount linear in the number of feature cells
{%- if config.token_encoder == "fusion" %}; only among the cells of the coarsest map, and only up to
a fixed number of them, is there attention, which in DETR's encoder is among all and costs their square.
{%- else %}; there is no attention among the cells, which in DETR's encoder costs their square.
{%- endif %}
{% if not evaluations %}
This card describes a configuration. No weights trained by it have been evaluated.
{% endif %}
## Architecture

| part | |
| --- | --- |
{{ architecture_rows }}

For one image of {{ image_height }} x {{ image_width }} pixels, a multiplication with its addition counted as 2 FLOPs:

{{ cost_table }}

{% if with_detr -%}
DETR has the same backbone, feature maps, width and heads here; as in its paper it has 6 + 6 layers, MLPs of eight
times the width and 100 object queries.
{% endif -%}
Activations are the outputs of matrix products and convolutions, attention weights included; fused attention does not
store the latter.
{%- if not config.share_key_values %}
Keys and values of the cells are computed in every block; `share_key_values=True` computes them once.
{%- endif %}
What a prediction costs can be chosen: `num_blocks` (the first blocks only)
{%- if config.query_selection %}, `token_share` (the part of the cells nearest
to what may be an object) and `num_queries`{% endif %}, when the model is loaded, called or evaluated.

## Use

```python
import deperceiver_hf  # makes the architecture known to transformers
from transformers import pipeline

detector = pipeline("object-detection", model="{{ model_path }}")
for detection in detector("photo.jpg", threshold=0.5):
    print(detection["label"], round(detection["score"], 2), detection["box"])
```

The model is a directory that training has written, or a repository on the Hub. Where the package is not installed,
`pipeline(..., trust_remote_code=True)` runs the code that was saved with the model. Scores are sigmoids of every class
on its own.

## Train

{% if training_command -%}
On COCO 2017, on four GPUs:

```bash
{{ training_command }}
```

{% if not evaluations -%}
This is a starting point in the manner of the papers below, and has not been run: AdamW, a tenth of the
learning rate for the backbone, a warm-up, a constant rate and a linear fall at the end.
{% endif -%}
The backbone starts from ImageNet weights; its stem, its first stage and all batch normalisation stay as they are.
Other fields of the configuration are set by `--config FIELD=VALUE`.
{%- elif config.token_encoder == "detector" -%}
Start from the same detector: `deperceiver train --start_from {{ origin.name }} ...`. Its own configuration decides
what of it is frozen. Other fields of the configuration are set by `--config FIELD=VALUE`.
{%- else -%}
Start from the nearest preset and set what differs: `scripts/train.py --architecture deperceiver_v2 --preset base
--config FIELD=VALUE ...`
{%- endif %}

## Results
{% for evaluation in evaluations %}
Measured on {{ evaluation.described() }}, in percent:

{{ evaluation.table() }}
{% else %}
Nothing has been measured with weights of this configuration.
{% endfor %}
## Limits and bias

- It is a subject of research, not a detector to rely on, least of all where an error may harm someone or where people
  are to be watched.
  {%- if not evaluations %} Its accuracy is not known.{% endif %}
- It finds at most {{ config.num_queries }} objects in an image, of the classes that it was trained on. Its scores are
  not calibrated, and nothing but training keeps two latents from the same object.
- Each latent reads mostly what is near its box. What an object is by its far surroundings has to come from the
  backbone or from the other latents.
- The finest cells have {{ config.feature_strides[0] }} pixels a side. Several objects in one such cell may be found as
  one.
- COCO's photographs were collected from one website and labelled by crowd workers. Places, people and things that are
  rare there are detected worse, and objects that its annotators overlooked are taught as background.

## Licence

{% if config.token_encoder == "detector" %}The code is under {% endif -%}
Apache-2.0. The images of COCO have licences of their own.
{%- if config.token_encoder == "detector" %} Backbone and encoder started from the weights of `{{ origin.name }}`,
{% if origin.license == "unknown" -%}
whose card states no licence.
{%- else -%}
whose licence is {{ origin.license }}.
{%- endif %}
{%- endif %}

## Citation

What it is made of, and whose idea that was:

| idea | paper |
| --- | --- |
{{ idea_rows }}

```bibtex
@misc{li2021deperceiver,
  title = { {DePerceiver}: Improving Small Object Detection in {DETR} },
  author = {Li, Edward and Kannan, Aditya},
  year = {2021},
  howpublished = {\\url{https://github.com/mooey5775/DePerceiver}}
}
```
"""

DETECTOR_SIDE = 640  # of most detectors on the Hub

# Idea, authors and year, title, number on arXiv.
IDEAS = (
    ("latents read an array again and again", "Jaegle et al. 2021", "Perceiver IO", "2107.14795"),
    ("detection as set prediction by object queries", "Carion et al. 2020", "DETR", "2005.12872"),
    ("queries picked from the image", "Zhu et al. 2021", "Deformable DETR, two-stage", "2010.04159"),
    ("boxes as positions of queries, refined per block", "Liu et al. 2022", "DAB-DETR", "2201.12329"),
    ("restoring noised objects in training", "Li et al. 2022", "DN-DETR", "2203.01305"),
    ("cells that say where the edges of their object are", "Tian et al. 2019", "FCOS", "1904.01355"),
    ("contrastive noise; choice of the best cells", "Zhang et al. 2022", "DINO", "2203.03605"),
    ("each head looks at a Gaussian near the box", "Gao et al. 2021", "SMCA", "2101.07448"),
    ("maps of several strides fused from coarse to fine and back", "Liu et al. 2018", "PANet", "1803.01534"),
    (
        "attention among the coarsest cells; the IoU as target of the classification",
        "Zhao et al. 2023",
        "RT-DETR",
        "2304.08069",
    ),
    ("matchability-aware loss", "Huang et al. 2024", "DEIM", "2412.04234"),
)


def make_deperceiver_v2_card(
    config: DePerceiverV2Config,
    name: str,
    *,
    evaluations: Sequence[Evaluation] = (),
    model_path: str = "path/to/model",
) -> ModelCard:
    """The card of a DePerceiver v2.

    Args:
        config: Of the model; parameters, tokens, FLOPs and activations are counted from it.
        name: Title of the card and name of the model in its metadata.
        evaluations: What was measured. Without any, the card has no accuracy and no `model-index`.
        model_path: What the example of use loads.
    """
    height, width = IMAGE_SIZE
    if config.token_encoder == "detector":
        height = width = _side_of_detector(config)
    costs = _comparable_costs(config, height, width)
    from_detector = config.token_encoder == "detector"
    origin = {"name": "DETECTOR", "license": "unknown"} | (config.start_from or {})
    preset = _preset_of(config)
    on_coco = preset is not None or set(COCO_CATEGORIES.values()) <= set(config.id2label.values())
    tags = ["deperceiver", "deperceiver-v2", "perceiver-io", "detr"]
    return ModelCard.from_template(
        card_metadata(
            name, tags, evaluations, datasets=["coco"] if on_coco else (), origin=origin if from_detector else None
        ),
        template_str=TEMPLATE,
        name=name,
        config=config,
        origin=origin,
        architecture_rows=_rows(_describe_architecture(config).items()),
        image_height=height,
        image_width=width,
        cost_table=cost_table(costs),
        with_detr=len(costs) > 1,
        model_path=model_path,
        training_command=None if preset is None else _training_command(preset, f"outputs/{name}"),
        evaluations=evaluations,
        idea_rows=_rows(
            (idea, f"{authors}, [{title}](https://arxiv.org/abs/{number})") for idea, authors, title, number in IDEAS
        ),
    )


def _describe_architecture(config: DePerceiverV2Config) -> dict[str, str]:
    """The parts of the model in words."""
    heads = plural(config.num_attention_heads, "head")
    origin = "picked from the tokens by a class head" if config.query_selection else "learned"
    around = ", each around a place of its own near the box" if config.position_bias else ""
    reported = "for which edges the tokens that they have read vote" if config.edge_votes else "where they have read"
    told = f"; the latent is told {reported}" if config.read_offsets else ""
    keys = "once for all blocks" if config.share_key_values else "by each block"
    noise = f"about {config.num_denoising_queries} queries, in training only"
    return {
        "backbone": ("backbone and encoder of a " if config.token_encoder == "detector" else "")
        + describe_backbone(config),
        "token encoder": ENCODERS[config.token_encoder].format(config=config),
        "tokens": f"{config.d_model} channels, by a 1x1 convolution and a norm for each feature map",
        "object latents": f"{config.num_queries}, {origin}",
        "blocks": f"{config.decoder_layers}, of self-attention, reading of the tokens and MLP",
        "reading": f"{heads}{around}{told}; keys and values computed {keys}",
        "MLP": f"{config.widening_factor * config.d_model:,} hidden channels",
        "boxes": f"corrected by each block, {STEPS[config.box_steps]}",
        "classes": f"{config.num_labels}, by a sigmoid each",
        "loss": f"{LOSSES[config.classification_loss]}; L1 and generalised IoU; after every block",
        "denoising": noise if config.num_denoising_queries else "none",
    }


def _comparable_costs(config: DePerceiverV2Config, height: int, width: int) -> Mapping[str, Cost]:
    """Costs by column: the model, and a DETR of the same width on the same feature maps, if there can be one."""
    counted = copy.deepcopy(config)
    counted._attn_implementation = {"": "eager"}
    costs = {
        "this model": count_cost(lambda: DePerceiverV2ForObjectDetection(counted), height, width, config.num_channels)
    }
    backbone: Any = config.backbone_config
    if backbone.model_type != "timm_backbone" or config.dilation or config.num_channels != 3:
        return costs
    with contextlib.suppress(UserError):  # not every backbone can be that of a DETR
        costs["DETR on the same tokens"] = count_cost(
            lambda: make_detr(
                config.strides,
                backbone=backbone.backbone,
                d_model=config.d_model,
                num_heads=config.num_attention_heads,
                attn_implementation="eager",
            ),
            height,
            width,
        )
    return costs


def _side_of_detector(config: DePerceiverV2Config) -> int:
    """Side of the images that costs are counted for, about 640 pixels."""
    source: Any = config.backbone_config
    multiple = detector_family(source).side_multiple(source)
    return math.ceil(DETECTOR_SIDE / multiple) * multiple


def _preset_of(config: DePerceiverV2Config) -> str | None:
    """The preset that this is in all but its classes, if it is one."""
    for preset in PRESETS:
        if _without_labels(deperceiver_v2_variant(preset)) == _without_labels(config):
            return preset
    return None


def _without_labels(config: DePerceiverV2Config) -> dict:
    ignored = ("id2label", "label2id", "num_labels", "architectures", "auto_map", "dtype", "transformers_version")
    return {name: value for name, value in config.to_dict().items() if name not in ignored}


def _training_command(preset: str, output_dir: str) -> str:
    lines = (
        "accelerate launch --multi_gpu --num_processes 4 scripts/train.py",
        f"{_recipe(preset)} --dataset path/to/coco --output_dir {output_dir}",
    )
    return " \\\n    ".join(lines)


def _recipe(preset: str) -> str:
    """The options that train a preset on COCO: a recipe, that of the base size for those that have none."""
    return f"--recipe coco-v2-{preset}" if preset in ("base", "large") else f"--recipe coco-v2-base --preset {preset}"


def _rows(cells: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
