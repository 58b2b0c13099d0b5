# SPDX-License-Identifier: Apache-2.0
"""The card of a model that a run has trained: what it started from, on what it was trained, what it scores there."""

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

import timm
import yaml
from huggingface_hub import ModelCard
from transformers import PreTrainedConfig

from ..data.classes import listing
from ..data.records import DetectionData
from ..evaluation.cards import METRIC_NAMES, Evaluation, card_metadata, is_hub_id, public_name
from ..evaluation.coco_metric import COCO_SIZE_BOUNDARIES
from ..jobs import plural, printable
from ..saved_models import license_of
from .arguments import TrainingOptions
from .building import pretrained_backbone_name
from .checkpoints import TrainingProgress

CARD_FILE = "README.md"
PLACES = ("dataset", "model", "start_from", "pretrained_backbone")  # options that may hold a path
OF_ONE_MACHINE = ("output_dir", "run_name", "project", "report_to", "resume", "overwrite_output_dir")
OF_SIZES = ("ap_small", "ap_medium", "ap_large")

TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

Detects {{ classes }}: a `{{ model_type }}` of the Python package `deperceiver_hf`, trained on {{ data }}.

## Results
{% for evaluation in evaluations %}
Measured on {{ evaluation.described() }}, in percent:

{{ evaluation.table() }}

Of several evaluations on these images in one run, the best ones were kept: on other images expect less.
{% else %}
Nothing was measured in the run.
{% endfor %}
## Use

```python
import deperceiver_hf  # makes the architecture known to transformers
from transformers import pipeline

detector = pipeline("object-detection", model="path/to/this/model")
for detection in detector("photo.jpg", threshold=0.5):
    print(detection["label"], round(detection["score"], 2), detection["box"])
```

## Training

{{ start }}
It was trained for {{ steps }} of {{ images }} by `deperceiver train` with these options, the others at their defaults
(of paths only the last part is shown):

```yaml
{{ options }}
```

## Limits

It knows what its training images show; on others it has not been measured. Its scores are not calibrated. Do not rely
on it where an error may harm someone.

## Licence

The code is under Apache-2.0.{% if licence %} {{ licence }}{% endif %} Whether the data allow to pass the model on is
for you to find out.
"""


def make_card_of_run(
    config: PreTrainedConfig,
    options: TrainingOptions,
    train: DetectionData,
    evaluation: DetectionData | None,
    progress: TrainingProgress,
    num_processes: int = 1,
) -> ModelCard:
    """The card of a model as it is saved: right after an evaluation, if the run has any.

    Args:
        config: Of the model.
        options: Of the run.
        train: What it was trained on.
        evaluation: What it was evaluated on, if it was.
        progress: Where the run is.
        num_processes: How many processes make a step.
    """
    name = public_name(options.directory)
    origin = _origin(config, options)
    evaluations = []
    of_other_sizes = tuple(options.size_boundaries) != tuple(COCO_SIZE_BOUNDARIES)
    if evaluation is not None and progress.last_metrics:
        measured = {
            key: progress.last_metrics[key]
            for key in METRIC_NAMES
            if progress.last_metrics.get(key, -1) != -1 and not (key in OF_SIZES and of_other_sizes)
        }
        dataset = public_name(options.val_annotations or options.data_name)
        split = f"part of {options.train_split}" if options.divides_a_split else options.eval_split
        evaluations = [Evaluation(measured, dataset, split, len(evaluation.dataset))] if measured else []
    images = options.batch_size * options.gradient_accumulation_steps * num_processes
    return ModelCard.from_template(
        card_metadata(
            name,
            [config.model_type],
            evaluations,
            datasets=[options.data_name] if is_hub_id(options.data_name) else (),
            origin=origin,
        ),
        template_str=TEMPLATE,
        name=printable(name),
        classes=f"{plural(len(train.label_names), 'class')} ({_in_words(train.label_names)})",
        model_type=config.model_type,
        data=f"`{_quoted(public_name(options.data_name))}`, {plural(len(train.dataset), 'image')}",
        evaluations=evaluations,
        start=_describe_start(config, options, origin),
        steps=plural(progress.step, "step"),
        images=plural(images, "image"),
        options=_shown_options(options),
        licence=_describe_licence(config, options, origin),
    )


def _origin(config: PreTrainedConfig, options: TrainingOptions) -> Mapping[str, str] | None:
    """`name` and `license` of the detector whose weights the run started from, if there was one."""
    if options.model is not None:
        return {"name": public_name(options.model), "license": _license_of(options.model)}
    return getattr(config, "start_from", None)


@cache
def _license_of(source: str) -> str:
    """As `license_of`, which may ask the Hub, once in a run."""
    return license_of(source)


def _describe_start(config: PreTrainedConfig, options: TrainingOptions, origin: Mapping[str, str] | None) -> str:
    if options.model is not None and origin is not None:
        return f"All weights started from `{_quoted(origin['name'])}`."
    if origin is not None:
        return f"Backbone and encoder started from `{_quoted(origin['name'])}`, the rest from random numbers."
    weights = pretrained_backbone_name(options, config)
    if weights is None:
        return "All weights started from random numbers."
    return f"The backbone started from the weights `{_quoted(public_name(weights))}`, the rest from random numbers."


def _describe_licence(config: PreTrainedConfig, options: TrainingOptions, origin: Mapping[str, str] | None) -> str:
    """What is known of the licence of the weights that the run started from."""
    if origin is not None:
        if origin["license"] == "unknown":
            return f"The card of `{_quoted(origin['name'])}`, where the weights come from, states no licence."
        return f"The licence of `{_quoted(origin['name'])}`, where the weights come from, is {origin['license']}."
    weights = pretrained_backbone_name(options, config)
    if weights is None:
        return ""
    known: Any = timm.get_pretrained_cfg(weights) if timm.is_model(weights.split(".")[0]) else None
    if known is not None and known.license:
        return f"Of the backbone's weights timm says: {known.license}."
    return "The weights of the backbone have a licence of their own."


def _shown_options(options: TrainingOptions) -> str:
    """The options that are not at their defaults, as YAML, without what only this machine knows."""
    shown: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.name not in OF_ONE_MACHINE and value != default:
            shown[field.name] = public_name(value) if field.name in PLACES else value
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).strip()


def _in_words(names: list[str]) -> str:
    return _quoted(listing(names))


def _quoted(text: str) -> str:
    """Text of a user that cannot end the code or the line of Markdown that it stands in."""
    return printable(text).replace("`", "'")
