# SPDX-License-Identifier: Apache-2.0
"""The training run itself: from options to the best models."""

import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast, broadcast_object_list, gather_object, send_to_device, set_seed
from tqdm.auto import tqdm

from ..data import (
    DetectionCollator,
    DetectionData,
    DetectionDataset,
    TrainingBatchSampler,
    is_synthetic,
    load_detection_data,
    make_train_transforms,
    require_same_labels,
)
from ..evaluation.coco_metric import areas_of_sizes
from ..evaluation.evaluator import evaluate_detector
from ..machine import choose_precision, find_device, make_accelerator
from ..output_files import write_json
from .arguments import TrainingOptions
from .batches import make_loader
from .building import build_image_processor, build_model
from .checkpoints import (
    BestModels,
    TrainingProgress,
    find_resumed_state,
    load_state,
    save_model,
    save_state,
)
from .interruption import StopRequest
from .optimization import create_optimizer, create_scheduler, learning_rates
from .reporting import TrainingLog, TrainingResult
from .run_directory import RunDirectory

logger = get_logger(__name__)

Result = TypeVar("Result")


class NonFiniteLossError(FloatingPointError):
    """The loss or its gradient is infinite or not a number; the message names step and terms."""


class DetectionTrainer:
    """A training run. Making it checks and loads all that a user can get wrong; `train` does the work.

    Every process of the run makes one and calls `train`.

    Args:
        options: What to do.

    Raises:
        ValueError: Options, data and model do not fit together.
        OSError: Data, weights or a state cannot be read, or the output directory must not be written to.
    """

    def __init__(self, options: TrainingOptions):
        self.options = options
        self.run_directory = RunDirectory(options.output_dir)
        self.accelerator = create_accelerator(options)
        state = self._main_process_first(lambda: find_resumed_state(options, self.run_directory))

        self.train_data = self._load_data(options.train_split, options.max_train_samples)
        self.eval_data: DetectionData | None = None
        if options.eval_every or options.eval_steps:
            self.eval_data = self._load_data(options.eval_split, options.max_eval_samples)
            require_same_labels(self.train_data, self.eval_data)
        self.image_processor = build_image_processor(options)
        size = self.image_processor.size
        transforms = make_train_transforms(options.augmentation, size.shortest_edge, size.longest_edge)
        self.dataset = DetectionDataset(
            self.train_data, transforms, seed=options.seed, cache_images=options.cache_images
        )
        self.collate = DetectionCollator(self.image_processor, do_resize=False)
        self.sampler = TrainingBatchSampler(
            self.dataset,
            options.batch_size,
            group_by_aspect_ratio=options.group_by_aspect_ratio,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        self.steps_per_epoch = -(-len(self.sampler) // options.gradient_accumulation_steps)
        self.total_steps = self.steps_per_epoch * options.epochs
        if options.max_steps is not None:
            self.total_steps = min(self.total_steps, options.max_steps)

        set_seed(options.seed)  # equal weights on all processes
        model = self._main_process_first(
            lambda: build_model(options, self.train_data.label_names, load_pretrained_backbone=state is None)
        )
        set_seed(options.seed, device_specific=True)  # different dropout on each
        optimizer = create_optimizer(model, options)
        self._time_used = 0.0  # of `max_minutes`, agreed on by all processes in every step
        self.scheduler = create_scheduler(
            optimizer, options, self.steps_per_epoch, self.total_steps, lambda: self._time_used
        )
        with warnings.catch_warnings():  # newer versions of torch have another name for it, older ones this only
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        # Not prepared: accelerate would step the schedule once for each process.
        self.accelerator.register_for_checkpointing(self.scheduler)

        self.progress, self.state = TrainingProgress(), state
        if state is not None:
            self.progress = load_state(self.accelerator, state, self.fingerprint())
            logger.info(f"Resumed from {state} after {self.progress.step} steps.")
        if self.accelerator.is_main_process:
            self.run_directory.clear(keep_run=options.resume is not None)
        self.log = TrainingLog(self.accelerator, self.run_directory.log, self.progress if state is not None else None)
        self.best_models = BestModels(self.accelerator, self.run_directory, options.save_top_k)
        self.stop_request = StopRequest()
        self._grad_norm: torch.Tensor | None = None  # of the last step, before clipping
        self._clock = time.perf_counter()

    def train(self) -> TrainingResult:
        """Train to the end, or until SIGINT or SIGTERM ask to stop.

        Raises:
            NonFiniteLossError: On all processes together; the newest state on disk is from before.
        """
        config = {name: value for name, value in vars(self.options).items() if isinstance(value, (int, float, str))}
        self.accelerator.init_trackers(
            self.options.project, config=config, init_kwargs={"wandb": {"name": self.options.run_name}}
        )
        interrupted = False
        with self.stop_request:
            while not interrupted and not self._finished:
                interrupted = self._train_stretch()
                if interrupted:
                    self._save_state()
                else:
                    self._close_stretch()
        last = self.run_directory.last
        if not interrupted:
            save_model(self.accelerator, last, self._save_model, self.progress.last_metrics)
        result = self._result(interrupted, None if interrupted else str(last))
        if self.accelerator.is_main_process and not interrupted:
            summary = dataclasses.asdict(result) | {
                "best_models": [dataclasses.asdict(model) for model in self.progress.best],
                "options": dataclasses.asdict(self.options),
            }
            write_json(self.run_directory.summary, summary)
        for tracker in self.accelerator.trackers:  # the processes stay together: the caller may go on
            tracker.finish()
        self.accelerator.trackers = []
        return result

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same in a resumed run, as JSON gives it back."""
        facts = self.options.facts()
        options = {
            name: value
            for name, value in dataclasses.asdict(self.options).items()
            if not facts[name].resume_may_change
        }
        if self.options.model is not None:  # it has its architecture, whether that is named or not
            del options["architecture"]
        data = {"training images": len(self.dataset), "classes": self.train_data.label_names}
        if is_synthetic(self.options.dataset):  # a directory may have moved, scenes are what their name says
            data["scenes"] = self.options.dataset
        run = {"processes": self.accelerator.num_processes, "precision": self.accelerator.mixed_precision}
        return json.loads(json.dumps({**options, **run, **data}))

    @property
    def _finished(self) -> bool:
        return self.progress.step >= self.total_steps and self.progress.closed_step == self.progress.step

    @property
    def _stretch_ends(self) -> bool:
        """At the end of the epoch, after the last step, or when `eval_steps` makes an evaluation due."""
        progress = self.progress
        at_end = progress.batches == len(self.sampler) or progress.step >= self.total_steps
        return at_end or (progress.closed_step < progress.step and self._evaluation_steps_done)

    @property
    def _evaluation_steps_done(self) -> bool:
        return self.options.eval_steps is not None and self.progress.step % self.options.eval_steps == 0

    def _train_stretch(self) -> bool:
        """Train to where `_stretch_ends`; `True` if a request to stop came before."""
        progress, options = self.progress, self.options
        self.sampler.set_epoch(progress.epoch, skip=progress.batches)
        loader = make_loader(
            self.dataset,
            self.sampler,
            self.collate,
            num_workers=options.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        self._clock = time.perf_counter()
        batches = iter(loader)
        self.model.train()
        first_step = progress.epoch * self.steps_per_epoch
        with tqdm(
            desc=f"Epoch {progress.epoch + 1}/{options.epochs}",
            initial=progress.step - first_step,
            total=min(self.steps_per_epoch, self.total_steps - first_step),
            disable=not self.accelerator.is_main_process,
        ) as bar:
            while not self._stretch_ends:
                rates = learning_rates(self.optimizer)
                count = min(options.gradient_accumulation_steps, len(self.sampler) - progress.batches)
                stop = self.optimizer_step(batches, count)
                progress.step += 1
                progress.batches += count
                bar.update()
                at_end, save_due = self._stretch_ends, self._checkpoint_due
                self._tick()
                if at_end or stop or save_due or progress.step % options.log_every == 0:
                    self.log.write_training(progress, self._epochs_done, rates, bar)
                if stop or (save_due and not at_end):
                    self._save_state()
                if stop:
                    return True
        return False

    def optimizer_step(self, batches: Iterator[Any], count: int) -> bool:
        """One step on the mean loss of the next `count` batches; returns whether some process was asked to stop.

        If the time is up on some process, this step becomes the last.
        """
        stop = False
        self.optimizer.zero_grad()
        for index in range(count):
            batch = send_to_device(next(batches), self.accelerator.device, non_blocking=True)
            # Gradients are averaged over processes once, in the backward pass of the last batch.
            with nullcontext() if index == count - 1 else self.accelerator.no_sync(self.model):
                loss, terms, problem = self._loss(batch)
                stop |= self._agree_to_go_on(loss, terms, problem)
                self.accelerator.backward(loss / count)
            self.log.add({"loss": loss, **terms}, images=len(batch["pixel_values"]))
        max_norm = self.options.clip_max_norm or float("inf")
        self._grad_norm = self.accelerator.clip_grad_norm_(self.parameters, max_norm)
        self.log.add({"grad_norm": self._grad_norm})
        self.optimizer.step()
        self.scheduler.step()
        return stop

    def _loss(self, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], str]:
        """Loss, its terms, and what is wrong with the predictions, if they are too broken to have a loss."""
        try:
            outputs = self.model(
                pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"], labels=batch["labels"]
            )
        except FloatingPointError as error:
            return torch.full((), torch.nan, device=self.accelerator.device), {}, str(error)
        return outputs.loss, outputs.loss_dict, ""

    def _agree_to_go_on(self, loss: torch.Tensor, terms: dict[str, torch.Tensor], problem: str) -> bool:
        """Stop all processes together on a loss that is not finite, and let them end together when the time is up by
        the clock of the main process; returns whether some process was asked to stop.

        This waits for the device once in a forward pass, right after the matching has done so anyway.
        """
        finite = loss.detach().isfinite()
        if self._grad_norm is not None and self.accelerator.scaler is None:  # a GradScaler skips such steps itself
            finite = finite & self._grad_norm.isfinite()
        time_used = 0.0
        if self.options.max_minutes is not None and self.accelerator.is_main_process:
            seconds = self.progress.seconds + time.perf_counter() - self._clock
            time_used = min(1.0, seconds / (60 * self.options.max_minutes))
        told = loss.new_tensor([self.stop_request.requested, time_used], dtype=torch.float32)
        told = torch.cat([(~finite).float().reshape(1), told])
        broken, stop, self._time_used = self.accelerator.reduce(told, reduction="sum").tolist()
        if self._time_used >= 1:
            self.total_steps = self.progress.step + 1
        if broken:
            values = {"loss": loss.item(), **{name: value.item() for name, value in terms.items()}}
            if self._grad_norm is not None:
                values["norm of the gradient before"] = self._grad_norm.item()
            report = problem or ", ".join(f"{name} {value:.6g}" for name, value in values.items())
            reports = gather_object([f"process {self.accelerator.process_index}: {report}"])
            raise NonFiniteLossError(
                f"the loss is not finite at step {self.progress.step + 1} (epoch {self.progress.epoch + 1}). "
                f"{'; '.join(reports)}. A lower --lr, more --warmup_steps or --mixed_precision bf16 or no may help."
            )
        return bool(stop)

    def _close_stretch(self) -> None:
        """Evaluate, keep the model if it is among the best, and save the state, each if due."""
        progress, options = self.progress, self.options
        epochs_done = self._epochs_done
        epoch_ended = progress.batches == len(self.sampler)
        if epoch_ended:
            progress.epoch, progress.batches = progress.epoch + 1, 0
        at_end = progress.step >= self.total_steps
        if options.eval_steps is None:
            evaluation_due = epoch_ended and options.eval_every and progress.epoch % options.eval_every == 0
        else:
            evaluation_due = self._evaluation_steps_done
        if self.eval_data is not None and (at_end or evaluation_due):
            self._share_buffers()
            result = evaluate_detector(
                self.model,
                self.image_processor,
                self.eval_data,
                accelerator=self.accelerator,
                batch_size=options.batch_size,
                num_workers=options.num_workers,
                area_boundaries=areas_of_sizes(options.size_boundaries),
            )
            progress.last_metrics = dict(result.metrics)
            self.log.write_evaluation(progress, epochs_done, result.metrics)
            logger.info(f"Epoch {epochs_done:g}: AP {100 * result.metrics['ap']:.2f}")
            label = progress.epoch + bool(progress.batches)
            self.best_models.offer(progress, label, result.metrics, self._save_model)
        progress.closed_step = progress.step
        if at_end or (epoch_ended and progress.epoch % options.save_every == 0) or self._checkpoint_due:
            self._save_state()
            self.best_models.remove_others(progress)

    @property
    def _checkpoint_due(self) -> bool:
        steps = self.options.checkpointing_steps
        return steps is not None and self.progress.step % steps == 0

    @property
    def _epochs_done(self) -> float:
        return self.progress.epoch + self.progress.batches / len(self.sampler)

    def _share_buffers(self) -> None:
        """Give all processes the batch norm statistics of the main process, whose model is the one that is saved."""
        for buffer in self.model.buffers():
            broadcast(buffer)

    def _save_state(self) -> None:
        if self._grad_norm is not None and self.accelerator.scaler is None and not self._grad_norm.isfinite():
            raise NonFiniteLossError(
                f"the gradient is not finite at step {self.progress.step}; the state before it has been kept."
            )
        self.state = save_state(self.accelerator, self.run_directory, self.progress, self.fingerprint())

    def _save_model(self, directory: Path) -> None:
        self.accelerator.unwrap_model(self.model).save_pretrained(directory)
        self.image_processor.save_pretrained(directory)

    def _load_data(self, split: str, max_samples: int | None) -> DetectionData:
        load = partial(load_detection_data, self.options.dataset, split, max_samples=max_samples)
        return self._main_process_first(load)

    def _main_process_first(self, function: Callable[[], Result]) -> Result:
        """Call on the main process, then on the others, which find its downloads; its error is raised on all."""
        error: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                result = function()
            except (ValueError, OSError) as raised:
                error = raised
        (message,) = broadcast_object_list([error and str(error)])  # not every exception can be pickled
        if message is not None:
            raise error or ValueError(message)
        return result if self.accelerator.is_main_process else function()

    def _tick(self) -> None:
        """Bring the time spent training up to date."""
        now = time.perf_counter()
        self.progress.seconds += now - self._clock
        self._clock = now

    def _result(self, interrupted: bool, last_model: str | None) -> TrainingResult:
        best = self.progress.best[0] if self.progress.best else None
        return TrainingResult(
            interrupted=interrupted,
            state=str(self.state),
            step=self.progress.step,
            epoch=self.progress.epoch,
            best_ap=best.ap if best else None,
            best_model=str(self.run_directory.path / best.path) if best else None,
            last_model=last_model,
            metrics=self.progress.last_metrics,
            seconds=round(self.progress.seconds, 3),
        )


def create_accelerator(options: TrainingOptions) -> Accelerator:
    """The accelerator of a run.

    Raises:
        ValueError: The precision is not possible here, a tracker is not installed, or the launcher was asked for
            gradient accumulation.
    """
    trackers = [name for name in options.report_to if name != "none"]
    available = [str(tracker) for tracker in get_available_trackers()]
    if missing := sorted(set(trackers) - {"all", *available}):
        raise ValueError(f"--report_to {' '.join(missing)}: not installed; try `pip install {' '.join(missing)}`.")
    precision = choose_precision(options.precision, find_device())
    accelerator = make_accelerator(
        mixed_precision=precision.name,
        log_with=trackers or None,
        project_dir=options.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=False)],
    )
    logger.info(f"Precision {precision.name}: {precision.reason}.")
    if precision.warning:
        logger.warning(precision.warning)
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError("give --gradient_accumulation_steps to the script, not to `accelerate launch`.")
    return accelerator
