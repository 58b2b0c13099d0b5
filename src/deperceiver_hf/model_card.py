# SPDX-License-Identifier: Apache-2.0
"""Model cards: what a model is, what it costs, how to use and train it, what was measured, where its limits are.

All cards come from [`TEMPLATE`]. Figures of the architecture are counted from the configuration; accuracy appears
only if an evaluation is given, and the paper's accuracy only as the paper's.
"""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .configuration_deperceiver import DePerceiverConfig
from .convert_original import COCO_CATEGORIES
from .cost import Cost, count_cost
from .modeling_deperceiver import DePerceiverForObjectDetection
from .output_files import atomic_path, write_json
from .variants import PAPER_NUM_LATENTS, SCALES, deperceiver_variant, make_variant

CARD_NAMES = {("multiscale" if scale == "multiscale" else f"stride{scale}"): scale for scale in SCALES}
MEASURED_FILE = "measured.json"
IMAGE_SIZE = (800, 1333)  # height, width: the largest that the image processor makes by default

# Key in an evaluation, name in a card.
METRIC_NAMES = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
}

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

- backbone: `{{ backbone }}`, {{ scale_text }}
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

The original's commands train 1024 latents unless told otherwise; the paper states {{ paper_num_latents }}, for which
set `--num_latents {{ paper_num_latents }}`.
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


@dataclass(frozen=True)
class Evaluation:
    """What a card needs of an evaluation.

    Attributes:
        metrics: Average precisions as fractions of 1, by the keys of [`METRIC_NAMES`]; only those that were measured.
        dataset: Name of the data set.
        split: Of the data set.
        num_images: How many images were evaluated.
        date: Day of the evaluation, `None` if unknown.
    """

    metrics: dict[str, float]
    dataset: str
    split: str
    num_images: int
    date: str | None = None

    def described(self) -> str:
        """Data set, split, number of images and date."""
        parts = [self.split, _plural(self.num_images, "image"), self.date]
        return f"{self.dataset} ({', '.join(part for part in parts if part)})"

    def table(self) -> str:
        """The metrics in percent."""
        names = [METRIC_NAMES[key] for key in self.metrics]
        return _table(names, [[f"{100 * value:.1f}" for value in self.metrics.values()]], labelled=False)


def read_evaluation(path: str | os.PathLike) -> Evaluation:
    """Read the JSON file that `scripts/evaluate.py` writes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not such a file, or nothing was measured.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no evaluation {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        dataset, split, num_images = content["dataset"], content["split"], content["num_images"]
        found = {key: content["metrics"][key] for key in METRIC_NAMES if key in content["metrics"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a report of scripts/evaluate.py ({type(error).__name__}: {error})."
        ) from error
    metrics = {}
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not (value == -1 or 0 <= value <= 1):
            raise ValueError(f"{path} has {key} = {value!r}; a fraction of 1 is expected, or -1 for nothing to find.")
        if value != -1:
            metrics[key] = float(value)
    if not metrics:
        raise ValueError(f"{path} has none of {', '.join(METRIC_NAMES)}: nothing was measured.")
    return Evaluation(metrics, _dataset_name(dataset), str(split), int(num_images), content.get("date"))


def make_model_card(
    config: DePerceiverConfig,
    name: str,
    *,
    evaluations: Sequence[Evaluation] = (),
    model_path: str = "path/to/model",
    converted_from: str | None = None,
) -> ModelCard:
    """Write the card of a model.

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
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="object-detection",
        tags=["object-detection", "vision", "deperceiver", "perceiver-io", "detr"],
        datasets=["coco"] if on_coco else None,
        model_name=name if evaluations else None,
        eval_results=[
            EvalResult(
                task_type="object-detection",
                dataset_type=evaluation.dataset,
                dataset_name=evaluation.dataset,
                dataset_split=evaluation.split,
                metric_type=key,
                metric_name=METRIC_NAMES[key],
                metric_value=round(100 * value, 2),
            )
            for evaluation in evaluations
            for key, value in evaluation.metrics.items()
        ]
        or None,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name,
        config=config,
        backbone=getattr(config.backbone_config, "backbone", None) or config.backbone_config.model_type,
        scale_text=_describe_scale(config),
        encoder_text=_describe_encoder(config),
        decoder_text=_describe_decoder(config),
        image_height=height,
        image_width=width,
        cost_table=_cost_table(costs),
        model_path=model_path,
        training_command=_training_command(config, f"outputs/{name}"),
        paper_num_latents=PAPER_NUM_LATENTS,
        evaluations=evaluations,
        paper_table=_table(
            ["model", *METRIC_NAMES.values()], [[model, *values] for model, values in PAPER_RESULTS.items()]
        ),
        paper_text=_describe_paper(scale),
        converted_from=converted_from,
    )


def write_model_cards(
    output_dir: str | os.PathLike, evaluations: Mapping[str, str | os.PathLike] | None = None
) -> list[Path]:
    """Write the cards of all documented configurations.

    What a card needs of the evaluations is kept in `measured.json` beside the cards, so that they can be made again
    without them. A new evaluation takes the place of an earlier one on the same split.

    Args:
        output_dir: Directory of the cards.
        evaluations: Files of `scripts/evaluate.py` by the keys of [`CARD_NAMES`] (`stride16`, `multiscale`, ...).

    Returns:
        The cards' files.

    Raises:
        ValueError: There is no such configuration, or a file is not an evaluation.
        OSError: A file is missing or cannot be written.
    """
    output_dir = Path(output_dir)
    evaluations = evaluations or {}
    unknown = sorted(evaluations.keys() - CARD_NAMES.keys())
    if unknown:
        raise ValueError(f"there is no configuration {', '.join(unknown)}; choose from {', '.join(CARD_NAMES)}.")
    measured = _read_measured(output_dir / MEASURED_FILE)
    for key, path in evaluations.items():
        new = read_evaluation(path)
        kept = [old for old in measured.get(key, []) if (old.dataset, old.split) != (new.dataset, new.split)]
        measured[key] = [*kept, new]
    output_dir.mkdir(parents=True, exist_ok=True)
    files = []
    for key, scale in CARD_NAMES.items():
        name = f"deperceiver-r50-{scale}"
        card = make_model_card(
            deperceiver_variant(scale), name, evaluations=measured.get(key, []), model_path=f"outputs/{name}/best"
        )
        files.append(output_dir / f"{name}.md")
        with atomic_path(files[-1]) as temporary:
            temporary.write_text(f"{card}\n", encoding="utf-8")
    if evaluations:
        kept = {key: [asdict(evaluation) for evaluation in measured[key]] for key in CARD_NAMES if key in measured}
        write_json(output_dir / MEASURED_FILE, kept)
    return files


def _read_measured(path: Path) -> dict[str, list[Evaluation]]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: [Evaluation(**fields) for fields in records] for key, records in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what an earlier call has kept ({error}). Delete it.") from error


def _dataset_name(dataset: str) -> str:
    """The name of a directory or, as it is, a Hub id."""
    is_path = dataset.startswith((".", "~", "/")) or dataset.count("/") > 1
    return Path(dataset).expanduser().resolve().name if is_path else dataset.rstrip("/")


def _countable_size(config: DePerceiverConfig) -> tuple[int, int]:
    """The default image size, or the part of it that learned positions reach over."""
    limit = max(IMAGE_SIZE)
    if config.position_embedding_type == "learned":
        limit = config.num_position_embeddings * min(config.feature_strides) // (2 if config.dilation else 1)
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


def _cost_table(costs: Mapping[str, Cost]) -> str:
    formats = {
        "tokens": lambda cost: f"{cost.tokens:,}",
        "parameters (M)": lambda cost: f"{cost.parameters / 1e6:.1f}",
        "of them in the backbone (M)": lambda cost: f"{cost.backbone_parameters / 1e6:.1f}",
        "GFLOPs of the backbone": lambda cost: f"{cost.backbone_flops / 1e9:,.1f}",
        "GFLOPs after the backbone": lambda cost: f"{cost.flops_after_backbone / 1e9:,.1f}",
        "activations after the backbone (M)": lambda cost: f"{cost.activations_after_backbone / 1e6:,.1f}",
        "of them attention weights (M)": lambda cost: f"{cost.attention_weights / 1e6:,.1f}",
    }
    return _table(["", *costs], [[title, *map(show, costs.values())] for title, show in formats.items()])


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]], labelled: bool = True) -> str:
    """A Markdown table of numbers, the first column of which are labels."""
    alignment = ["---" if labelled and not column else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (header, alignment, *rows))


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
    for part in name.split("."):
        config = getattr(config, part, None)
    return config


def _describe_scale(config: DePerceiverConfig) -> str:
    *others, last = config.feature_strides
    text = (
        f"feature maps of strides {', '.join(map(str, others))} and {last}"
        if others
        else f"feature map of stride {last}"
    )
    return f"{text}, last stage dilated" if config.dilation else text


def _describe_encoder(config: DePerceiverConfig) -> str:
    return (
        f"{config.num_latents} latents of {config.d_latents} channels; "
        f"one cross-attention ({_plural(config.num_cross_attention_heads, 'head')}), "
        f"then {_plural(config.num_blocks, 'pass')} through one stack of "
        f"{_plural(config.num_self_attends_per_block, 'self-attention layer')} "
        f"({_plural(config.num_self_attention_heads, 'head')})"
    )


def _describe_decoder(config: DePerceiverConfig) -> str:
    queries = f"{config.num_queries} object queries"
    if config.decoder_type == "cross_attention":
        return f"{queries}, one cross-attention"
    return f"{queries}, {_plural(config.decoder_layers, 'layer')} of self-attention and cross-attention"


def _describe_paper(scale: str | None) -> str:
    if scale is None:
        return f"Its models have {PAPER_NUM_LATENTS:,} latents."
    if scale == "multiscale":
        return "The multi-scale model has none: it did not train stably in the 10 epochs that the authors tried."
    if scale == "4":
        return "There is none for a stride of 4."
    return f"This configuration is DePerceiver-{scale}, there with {PAPER_NUM_LATENTS:,} latents."


def _training_command(config: DePerceiverConfig, output_dir: str) -> str | None:
    """The original's recipe, with the options of `scripts/train.py` that make this configuration."""
    options = ["--dataset path/to/coco", f"--output_dir {output_dir}"]
    if config.feature_strides == SCALES["multiscale"]:
        options.append("--multiscale")
    elif config.num_feature_levels == 1:
        options.append(f"--downsample_factor {config.feature_strides[0]}")
    else:
        return None
    if config.d_latents != config.d_model or config.backbone_config.model_type != "timm_backbone":
        return None
    if config.dilation:
        options.append("--dilation")
    described = {
        "backbone": (config.backbone_config.backbone, "resnet50"),
        "position_embedding": (config.position_embedding_type, "sine"),
        "num_latents": (config.num_latents, 1024),
        "enc_blocks": (config.num_blocks, 3),
        "enc_layers_per_block": (config.num_self_attends_per_block, 6),
        "nheads": (config.num_self_attention_heads, 8),
        "hidden_dim": (config.d_model, 256),
        "num_queries": (config.num_queries, 100),
    }
    options += [f"--{name} {value}" for name, (value, default) in described.items() if value != default]
    if config.decoder_type == "cross_attention":
        options.append("--no_aux_loss")
    elif config.decoder_layers != 3:
        options.append(f"--dec_layers {config.decoder_layers}")
    options += ["--epochs 50", "--lr_drop 33", "--batch_size 2", "--num_workers 3", "--amp"]
    lines = ["accelerate launch --multi_gpu --num_processes 4 scripts/train.py"]
    lines += [" ".join(options[start : start + 4]) for start in range(0, len(options), 4)]
    return " \\\n    ".join(lines)


def _plural(count: int, noun: str) -> str:
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}{'es' if noun.endswith('s') else 's'}"
