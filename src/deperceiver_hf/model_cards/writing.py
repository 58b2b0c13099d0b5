# SPDX-License-Identifier: Apache-2.0
"""The cards of all documented configurations, as files."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import ModelCard

from ..benchmarks.variants import SCALES, deperceiver_v2_variant, deperceiver_variant
from ..errors import UserError
from ..evaluation.cards import Evaluation, read_evaluation
from ..models.configuration_deperceiver import DePerceiverConfig
from ..models.configuration_deperceiver_v2 import PRESETS, DePerceiverV2Config
from ..output_files import as_path, atomic_path, write_json
from .deperceiver import make_deperceiver_card
from .deperceiver_v2 import make_deperceiver_v2_card

MEASURED_FILE = "measured.json"


@dataclass(frozen=True)
class DocumentedCard:
    """A configuration that has a card.

    Attributes:
        name: Of the model, and of the file without its suffix.
        config: Makes the configuration.
    """

    name: str
    config: Callable[[], DePerceiverConfig | DePerceiverV2Config]


# By the name that evaluations are given for.
CARDS = {
    ("multiscale" if scale == "multiscale" else f"stride{scale}"): DocumentedCard(
        f"deperceiver-r50-{scale}", partial(deperceiver_variant, scale)
    )
    for scale in SCALES
} | {
    f"v2-{preset}": DocumentedCard(f"deperceiver-v2-{preset}", partial(deperceiver_v2_variant, preset))
    for preset in PRESETS
}


def make_model_card(config: DePerceiverConfig | DePerceiverV2Config, name: str, **options) -> ModelCard:
    """The card of a model.

    Args:
        config: Of the model; parameters, tokens, FLOPs and activations are counted from it.
        name: Title of the card and name of the model in its metadata.
        options: See [`~deperceiver_hf.model_cards.deperceiver.make_deperceiver_card`] and
            [`~deperceiver_hf.model_cards.deperceiver_v2.make_deperceiver_v2_card`].
    """
    make = make_deperceiver_v2_card if isinstance(config, DePerceiverV2Config) else make_deperceiver_card
    return make(config, name, **options)


def write_model_cards(
    output_dir: str | os.PathLike, evaluations: Mapping[str, str | os.PathLike] | None = None
) -> list[Path]:
    """Write the cards of all documented configurations.

    What a card needs of the evaluations is kept in `measured.json` beside the cards, so that they can be made again
    without them. A new evaluation takes the place of an earlier one on the same split.

    Args:
        output_dir: Directory of the cards.
        evaluations: Files of `deperceiver evaluate` by the keys of [`CARDS`] (`stride16`, `v2-base`, ...).

    Returns:
        The cards' files.

    Raises:
        ValueError: There is no such configuration, or a file is not an evaluation.
        OSError: A file is missing or cannot be written.
    """
    output_dir = as_path(output_dir)
    evaluations = evaluations or {}
    unknown = sorted(evaluations.keys() - CARDS.keys())
    if unknown:
        raise UserError(f"there is no configuration {', '.join(unknown)}; choose from {', '.join(CARDS)}.")
    measured = _read_measured(output_dir / MEASURED_FILE)
    for key, path in evaluations.items():
        new = read_evaluation(path)
        kept = [old for old in measured.get(key, []) if (old.dataset, old.split) != (new.dataset, new.split)]
        measured[key] = [*kept, new]
    output_dir.mkdir(parents=True, exist_ok=True)
    files = []
    for key, card in CARDS.items():
        text = make_model_card(
            card.config(), card.name, evaluations=measured.get(key, []), model_path=f"outputs/{card.name}/best"
        )
        files.append(output_dir / f"{card.name}.md")
        with atomic_path(files[-1]) as temporary:
            temporary.write_text(f"{text}\n", encoding="utf-8")
    if evaluations:
        figures = {key: [asdict(evaluation) for evaluation in measured[key]] for key in CARDS if key in measured}
        write_json(output_dir / MEASURED_FILE, figures)
    return files


def _read_measured(path: Path) -> dict[str, list[Evaluation]]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: [Evaluation(**fields) for fields in records] for key, records in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not what an earlier call has kept ({error}). Delete it.") from error
