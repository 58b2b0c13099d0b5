# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a detector on your own data with transformers' `Trainer`.

    python examples/transformers_trainer.py --model outputs/v2/best --dataset path/to/data --output_dir outputs/trainer

All options of `TrainingArguments` can be given besides, `--resume_from_checkpoint` and `--push_to_hub` among them. The
model that is best on the validation split ends up in the output directory with its image processor, ready for
`pipeline("object-detection", model="outputs/trainer")`.

`deperceiver train` is the shorter way and knows more (resuming to the bit, images that break, the recipe); this is for
those who have a `Trainer` already.
"""

from dataclasses import dataclass, field

import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    EarlyStoppingCallback,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from deperceiver_hf.data import DetectionDataset, load_detection_data, make_train_transforms, with_labels_of
from deperceiver_hf.training.building import backbone_parameters
from deperceiver_hf.training.transformers_trainer import (
    TRAINING_ARGUMENTS,
    AugmentationEpochs,
    TrainerCollator,
    TrainerMetrics,
)


@dataclass
class ExampleArguments:
    dataset: str = field(metadata={"help": "Whatever `deperceiver train --dataset` takes."})
    model: str = field(metadata={"help": "Saved model, or Hub id, to start from."})
    shortest_edge: int = field(default=480, metadata={"help": "Size of the images."})
    longest_edge: int = field(default=640, metadata={"help": "Limit of the longer side."})
    augmentation: str = field(default="crop", metadata={"help": "See `deperceiver train --help`."})
    patience: int = field(default=5, metadata={"help": "Evaluations without a better AP that end the training."})


def main(command_line: list[str] | None = None) -> Trainer:
    parser = HfArgumentParser((ExampleArguments, TrainingArguments))
    parser.set_defaults(
        **TRAINING_ARGUMENTS,
        learning_rate=1e-4,
        weight_decay=1e-4,
        warmup_steps=100,
        num_train_epochs=50,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
    )
    given, arguments = parser.parse_args_into_dataclasses(command_line)

    train = load_detection_data(given.dataset, "train")
    evaluation = with_labels_of(train, load_detection_data(given.dataset, "val"))

    # The heads of the classes start anew where the model has another number of them.
    labels = {"id2label": train.id2label, "label2id": {name: label for label, name in train.id2label.items()}}
    model = AutoModelForObjectDetection.from_pretrained(given.model, ignore_mismatched_sizes=True, **labels)
    edges = {"shortest_edge": given.shortest_edge, "longest_edge": given.longest_edge}
    processor = AutoImageProcessor.from_pretrained(given.model, size=edges)

    # Images are augmented and resized by the data set in training, and resized by the processor in evaluation.
    transforms = make_train_transforms(given.augmentation, resample=processor.resample, **edges)
    training_set = DetectionDataset(train, transforms, seed=arguments.seed)
    collate_training = TrainerCollator(processor, do_resize=False)
    collate_evaluation = TrainerCollator(processor, do_resize=True)

    backbone = backbone_parameters(model)
    groups = [
        {"params": [p for name, p in model.named_parameters() if name not in backbone and p.requires_grad]},
        {"params": [p for p in backbone.values() if p.requires_grad], "lr": 0.1 * arguments.learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)

    class DetectionTrainer(Trainer):
        def get_eval_dataloader(self, eval_dataset=None):
            self.data_collator = collate_evaluation
            try:
                return super().get_eval_dataloader(eval_dataset)
            finally:
                self.data_collator = collate_training

    trainer = DetectionTrainer(
        model=model,
        args=arguments,
        train_dataset=training_set,
        eval_dataset=DetectionDataset(evaluation),
        data_collator=collate_training,
        processing_class=processor,  # saved and pushed with the model
        compute_metrics=TrainerMetrics(evaluation, processor),
        optimizers=(optimizer, None),
        callbacks=[AugmentationEpochs(training_set), EarlyStoppingCallback(given.patience)],
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("eval", trainer.evaluate())
    if arguments.push_to_hub:
        trainer.push_to_hub(finetuned_from=given.model, tags=["object-detection"])
    return trainer


if __name__ == "__main__":
    main()
