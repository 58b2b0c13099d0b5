# SPDX-License-Identifier: Apache-2.0
"""The card of a DePerceiver. The paper's accuracy appears only as the paper's."""

import copy
from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCard

from ..benchmarks.cost import Cost, count_cost
from ..benchmarks.variants import PAPER_NUM_LATENTS, SCALES, deperceiver_variant, make_variant
from ..data.coco_categories import COCO_CATEGORIES
from ..evaluation.cards import METRIC_NAMES, Evaluation, card_metadata
from ..jobs import markdown_table, plural
from ..models.configuration_deperceiver import DePerceiverConfig
from ..models.modeling_deperceiver import DePerceiverForObjectDetection
from ..training.recipes import read_recipe
from .tables import IMAGE_SIZE, cost_table, describe_backbone

RECIPE = "coco-deperceiver"
# "DePerceiver: Improving Small Object Detection in DETR", COCO val2017, 50 epochs, ResNet-50.
PAPER_RESULTS = {
    "DETR (stride 32)": (34.1, 54.9, 35.3, 13.2, 36.5, 53.0),
    "DePerceiver-32": (10.5, 20.8, 9.3, 4.3, 11.8, 15.6),
    "DePerceiver-16": (15.3, 27.1, 16.3, 7.1, 16.3, 22.3),
    "DePerceiver-8": (11.4, 21.5, 10.5, 3.6, 10.8, 19.4),
}

TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

DePerceiver detects objects as [DETR](https://arxiv.org/abs/2005.12872) does, as a set and without anchors or
non-maximum suppression, but with a [Perceiver IO](https://arxiv.org/abs/2107.14795) in place of the transformer.
Learned latents read the feature map of a convolutional backbone once and attend to each other after that; learned
object queries read the latents, and each gives a class and a box. What follows the backbone costs an amount linear in
the number of feature cells, so that finer feature maps, which small objects need, remain affordable.
{% if converted_from %}
The weights are those of `{{ converted_from }}`, a checkpoint of the
[authors' code](https://github.com/mooey5775/DePerceiver), converted. Such a checkpoint does not record how it was
trained.
{% elif not evaluations %}
This card describes a configuration. No weights trained by it have been evaluated.
{% endif %}
## Architecture

- backbone: {{ backbone_text }}
- encoder: {{ encoder_text }}
- decoder: {{ decoder_text }}
- positions: {{ config.position_embedding_type }}; classes: {{ config.num_labels }}

For one image of {{ image_height }} x {{ image_width }} pixels, a multiplication with its addition counted as 2 FLOPs:

{{ cost_table }}

Activations are the outputs of matrix products and convolutions, attention weights included; fused attention does not
store the latter. The work among the latents is a fixed price: the architecture saves only where tokens are many.

## Use

```python
import deperceiver_hf  # makes the architecture known to transformers
from transformers import pipeline

detector = pipeline("object-detection", model="{{ model_path }}")
for detection in detector("photo.jpg", threshold=0.5):
    print(detection["label"], round(detection["score"], 2), detection["box"])
```

The model is a directory that training or conversion has written, or a repository on the Hub. Where the package is not
installed, `pipeline(..., trust_remote_code=True)` runs the code that was saved with the model.

## Train

{% if training_command -%}
With the recipe of the original on COCO 2017, on four GPUs:

```bash
{{ training_command }}
```

AdamW with a learning rate of 1e-4 (backbone 1e-5) that falls to a tenth after 33 of 50 epochs, weight decay 1e-4,
gradients clipped to a norm of 0.1, two images per GPU. The backbone starts from ImageNet weights; its stem, its first
stage and all batch normalisation stay as they are.
{%- if config.num_latents != paper_num_latents %}

The original's commands train 1024 latents unless told otherwise; the paper states {{ paper_num_latents }}, which
the recipe has: leave out `--num_latents`.
{%- endif %}
{%- else -%}
The options of `scripts/train.py` do not describe this configuration; build it in Python.
{%- endif %}

## Results
{% for evaluation in evaluations %}
Measured on {{ evaluation.described() }}, in percent:

{{ evaluation.table() }}
{% endfor %}
Reported by the paper, not measured here: COCO val2017 after 50 epochs, ResNet-50, in percent. {{ paper_text }}

{{ paper_table }}

## Limits and bias

- By the paper's figures DePerceiver is far less accurate than DETR. It is a subject of research, not a detector to
  rely on, least of all where an error may harm someone or where people are to be watched.
- It finds at most {{ config.num_queries }} objects in an image, of the classes that it was trained on, and its scores
  are not calibrated.
- COCO's photographs were collected from one website and labelled by crowd workers. Places, people and things that are
  rare there are detected worse, and objects that its annotators overlooked are taught as background.
- Images much larger or smaller than those of the training have feature maps that the latents have not learned to read.

## Licence

Apache-2.0, as is the authors' code. The images of COCO have licences of their own.

## Citation

```bibtex
@misc{li2021deperceiver,
  title = { {DePerceiver}: Improving Small Object Detection in {DETR} },
  author = {Li, Edward and Kannan, Aditya},
  year = {2021},
  howpublished = {\\url{https://github.com/mooey5775/DePerceiver}}
}
```
"""


def make_deperceiver_card(
    config: DePerceiverConfig,
    name: str,
    *,
    evaluations: Sequence[Evaluation] = (),
    model_path: str = "path/to/model",
    converted_from: str | None = None,
) -> ModelCard:
    """The card of a DePerceiver.

    Args:
        config: Of the model; parameters, tokens, FLOPs and activations are counted from it.
        name: Title of the card and name of the model in its metadata.
        evaluations: What was measured. Without any, the card has no accuracy of its own and no `model-index`.
        model_path: What the example of use loads.
        converted_from: Name of the authors' checkpoint that the weights are from.
    """
    height, width = _countable_size(config)
    costs = _comparable_costs(config, height, width)
    scale = _scale_of(config)
    # A converted model was trained on COCO if it has its classes, a documented one is by the recipe of the card.
    on_coco = set(COCO_CATEGORIES.values()) <= set(config.id2label.values()) or (scale and converted_from is None)
    tags = ["deperceiver", "perceiver-io", "detr"]
    return ModelCard.from_template(
        card_metadata(name, tags, evaluations, datasets=["coco"] if on_coco else ()),
        template_str=TEMPLATE,
        name=name,
        config=config,
        backbone_text=describe_backbone(config),
        encoder_text=_describe_encoder(config),
        decoder_text=_describe_decoder(config),
        image_height=height,
        image_width=width,
        cost_table=cost_table(costs),
        model_path=model_path,
        training_command=_training_command(config, f"outputs/{name}"),
        paper_num_latents=PAPER_NUM_LATENTS,
        evaluations=evaluations,
        paper_table=markdown_table(
            ["model", *METRIC_NAMES.values()], [[model, *values] for model, values in PAPER_RESULTS.items()]
        ),
        paper_text=_describe_paper(scale),
        converted_from=converted_from,
    )


def _countable_size(config: DePerceiverConfig) -> tuple[int, int]:
    """The default image size, or the part of it that learned positions reach over."""
    limit = max(IMAGE_SIZE)
    if config.position_embedding_type == "learned":
        limit = config.num_position_embeddings * min(config.strides) // (2 if config.dilation else 1)
    return min(IMAGE_SIZE[0], limit), min(IMAGE_SIZE[1], limit)


def _comparable_costs(config: DePerceiverConfig, height: int, width: int) -> dict[str, Cost]:
    """Costs by column: the model, the same with the paper's latents, and DETR on the same feature map."""

    def count(num_latents: int) -> Cost:
        counted = copy.deepcopy(config)
        counted.num_latents = num_latents
        counted._attn_implementation = {"": "eager"}
        return count_cost(lambda: DePerceiverForObjectDetection(counted), height, width, config.num_channels)

    costs = {f"{config.num_latents:,} latents": count(config.num_latents)}
    scale = _scale_of(config)
    if scale is None:
        return costs
    if config.num_latents != PAPER_NUM_LATENTS:
        costs[f"{PAPER_NUM_LATENTS:,} latents (paper)"] = count(PAPER_NUM_LATENTS)
    if scale in ("32", "16", "8", "multiscale"):
        name = f"detr-{scale}"
        costs["DETR on the same tokens"] = count_cost(
            lambda: make_variant(name, attn_implementation="eager"), height, width
        )
    return costs


def _scale_of(config: DePerceiverConfig) -> str | None:
    """The documented configuration that this is in all but number of latents and classes, if it is one."""
    for scale, strides in SCALES.items():
        if strides != config.feature_strides:
            continue
        documented = deperceiver_variant(scale)
        same = ("backbone_config.backbone", "decoder_type", "dilation", "position_embedding_type", "num_queries")
        sizes = ("d_latents", "d_model", "num_blocks", "num_self_attends_per_block")
        if all(_field(config, name) == _field(documented, name) for name in same + sizes):
            return scale
    return None


def _field(config: DePerceiverConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _describe_encoder(config: DePerceiverConfig) -> str:
    return (
        f"{config.num_latents} latents of {config.d_latents} channels; "
        f"one cross-attention ({plural(config.num_cross_attention_heads, 'head')}), "
        f"then {plural(config.num_blocks, 'pass')} through one stack of "
        f"{plural(config.num_self_attends_per_block, 'self-attention layer')} "
        f"({plural(config.num_self_attention_heads, 'head')})"
    )


def _describe_decoder(config: DePerceiverConfig) -> str:
    queries = f"{config.num_queries} object queries"
    if config.decoder_type == "cross_attention":
        return f"{queries}, one cross-attention"
    return f"{queries}, {plural(config.decoder_layers, 'layer')} of self-attention and cross-attention"


def _describe_paper(scale: str | None) -> str:
    if scale is None:
        return f"Its models have {PAPER_NUM_LATENTS:,} latents."
    if scale == "multiscale":
        return "The multi-scale model has none: it did not train stably in the 10 epochs that the authors tried."
    if scale == "4":
        return "There is none for a stride of 4."
    return f"This configuration is DePerceiver-{scale}, there with {PAPER_NUM_LATENTS:,} latents."


def _training_command(config: DePerceiverConfig, output_dir: str) -> str | None:
    """The original's recipe, with the options that make this configuration where it differs."""
    recipe = read_recipe(RECIPE)
    options = ["--dataset path/to/coco", f"--output_dir {output_dir}"]
    if config.feature_strides == SCALES["multiscale"]:
        options.append("--multiscale")
    elif config.num_feature_levels != 1:
        return None
    elif config.strides[0] != recipe["downsample_factor"]:
        options.append(f"--downsample_factor {config.strides[0]}")
    backbone: Any = config.backbone_config
    if config.d_latents != config.d_model or backbone.model_type != "timm_backbone":
        return None
    if config.dilation:
        options.append("--dilation")
    described = {
        "backbone": (backbone.backbone, "resnet50"),
        "position_embedding": (config.position_embedding_type, "sine"),
        "num_latents": (config.num_latents, recipe["num_latents"]),
        "enc_blocks": (config.num_blocks, 3),
        "enc_layers_per_block": (config.num_self_attends_per_block, 6),
        "nheads": (config.num_self_attention_heads, 8),
        "hidden_dim": (config.d_model, 256),
        "num_queries": (config.num_queries, 100),
    }
    options += [f"--{name} {value}" for name, (value, default) in described.items() if value != default]
    if config.decoder_type != "cross_attention":
        options.append(f"--dec_layers {config.decoder_layers}")
    lines = [f"accelerate launch --multi_gpu --num_processes 4 scripts/train.py --recipe {RECIPE}"]
    lines += [" ".join(options[start : start + 4]) for start in range(0, len(options), 4)]
    return " \\\n    ".join(lines)
