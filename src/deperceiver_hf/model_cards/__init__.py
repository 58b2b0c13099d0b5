# SPDX-License-Identifier: Apache-2.0
"""Model cards: what a model is, what it costs, how to use and train it, what was measured, where its limits are.

One module writes the cards of each architecture. Figures of the architecture are counted from the configuration;
accuracy appears only if an evaluation is given.
"""

from ..evaluation.cards import Evaluation, read_evaluation
from .writing import CARDS, MEASURED_FILE, make_model_card, write_model_cards

__all__ = ["CARDS", "MEASURED_FILE", "Evaluation", "make_model_card", "read_evaluation", "write_model_cards"]
