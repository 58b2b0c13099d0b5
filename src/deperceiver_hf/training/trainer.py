# SPDX-License-Identifier: Apache-2.0
"""The training run itself: from options to the best models."""

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast, gather_object, send_to_device, set_seed
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.sampling import iterating
from ..evaluation.coco_metric import areas_of_sizes
from ..evaluation.evaluator import EvaluationResult, InterruptedEvaluationError, as_percent, evaluate_detector
from ..machine import is_sharding_asked_for
from ..output_files import require_writable_directory, write_json
from .architectures.backbones import backbone_of
from .arguments import TrainingOptions
from .averaging import WeightAverage
from .batch_size import fitting_batch_size, resumed_batch_size
from .building import build_model, training_mode
from .checkpoints import BestModels, TrainingProgress, find_resumed_state, load_state, save_model, save_state
from .computation import Float32Depthwise, ThreadWatch, choose_computation
from .feature_cache import FeatureCache
from .finiteness import FinitenessGuard, NonFiniteLossError
from .interruption import StopRequest
from .model_card import CARD_FILE, make_card_of_run
from .optimization import create_optimizer, create_scheduler, learning_rates
from .pace import Pace, as_duration
from .pictures import RunPictures
from .processes import main_process_first
from .recipes import write_options
from .reporting import TrainingLog, TrainingResult
from .run_directory import RunDirectory
from .schedule import RunSchedule
from .setup import TrainingData, create_accelerator, make_fingerprint
from .sharding import ModelShards, whole

logger = get_logger(__name__)

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"  # the time left of a run is not that of its steps alone


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
        self.run_directory = RunDirectory(options.directory)
        self.accelerator = create_accelerator(options)
        self.state = main_process_first(self.accelerator, self._find_state)
        if options.has_automatic_batch_size and self.state is not None:
            self.options = options = resumed_batch_size(options, self.state)
        self.data = TrainingData.load(options, self.accelerator, self.state)
        if options.has_automatic_batch_size:
            self.options = options = fitting_batch_size(options, self.accelerator, self.data)
            self.data = self.data.with_batches(options, self.accelerator)
        self.schedule = RunSchedule(options, batches_per_epoch=len(self.data.sampler))
        if self.data.dataset.mixing is not None:
            self.data.sampler.is_plain = self._is_plain
        self._set_up_model()
        self._fingerprint = make_fingerprint(options, self.data, self.accelerator)
        self._begin_or_resume()
        self.best_models = BestModels(self.accelerator, self.run_directory, options.save_top_k)
        self.stop_request = StopRequest()
        self.guard = FinitenessGuard(self.accelerator, self.data, self.progress)
        self.pace = Pace(options, self.progress, self.schedule)
        self.pictures = RunPictures(self.accelerator, self.run_directory, self.data.evaluation, options.pictures)

    # Set-up

    def _find_state(self) -> Path | None:
        state = find_resumed_state(self.options, self.run_directory)
        require_writable_directory(self.run_directory.path)
        return state

    def _set_up_model(self) -> None:
        """Make the model, its optimizer and the schedule of its learning rate."""
        options = self.options
        set_seed(options.seed)  # equal weights on all processes
        model = main_process_first(
            self.accelerator,
            lambda: build_model(options, self.data.train.label_names, load_pretrained_backbone=self.state is None),
        )
        self.data.look_over(options, model.config)
        most_threads = torch.get_num_threads()
        self.computation = choose_computation(options, self.accelerator, model.config, self.state)
        if self.computation.attention is not None:
            model.set_attn_implementation(self.computation.attention)
        Float32Depthwise.of(model)
        self.threads = ThreadWatch(self.accelerator.device, self.computation.threads, most_threads)
        torch.set_num_threads(self.computation.threads)
        set_seed(options.seed, device_specific=True)  # different dropout on each
        self.shards = ModelShards(model, self.accelerator) if is_sharding_asked_for() else None
        optimizer = create_optimizer(model, options)
        self.scheduler = create_scheduler(
            optimizer,
            options,
            self.schedule.steps_per_epoch,
            self.schedule.total_steps,
            time_used=lambda: self.schedule.time_used,
            early_decay=lambda: self.schedule.early_decay,
        )
        self.model, self.optimizer = model, optimizer
        if self.shards is None:
            self._prepare()
        else:
            self.shards.optimizer = optimizer
        # The schedule is not prepared: accelerate would step it once for each process.
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.average = None if options.ema_decay is None else WeightAverage(self._whole_model, options.ema_decay)
        if options.cache_features:
            FeatureCache(*(backbone_of(model) for model in (*self._models, self._trained_model)))

    def _prepare(self) -> None:
        """Let accelerate put model and optimizer on the device, and wrap the model for several processes."""
        with warnings.catch_warnings():  # newer versions of torch have another name for it, older ones this only
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    @property
    def _trained_model(self) -> PreTrainedModel:
        """The model that is trained, without wrappers; it may be in shards."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def _whole_model(self) -> PreTrainedModel:
        """The model that is trained, or a copy of it that is in no shards and as new as they were last gathered."""
        return self._trained_model if self.shards is None else self.shards.whole

    @property
    def _models(self) -> list[PreTrainedModel]:
        """The average of the weights, if there is one, and the model that is trained: the first is evaluated and
        saved."""
        return [self._whole_model] if self.average is None else [self.average.model, self._whole_model]

    def _begin_or_resume(self) -> None:
        """Restore the state that the run goes on from, if there is one, and make the output directory ready."""
        self.progress, resumed_from = TrainingProgress(), None
        if self.state is not None:
            loaded = load_state(
                self.accelerator, self.state, self.scheduler, self._fingerprint, self.average, self.shards
            )
            self.progress = resumed_from = loaded
            self.schedule.resume(loaded)
            self.data.dataset.leave_out(loaded.unreadable)
            logger.info(f"Resumed from {self.state} after {self.progress.step} steps.")
        if self.accelerator.is_main_process:
            self._clear_directory()
            write_options(self.run_directory.options, self.options)
            self.data.splits.write(self.run_directory)
        self.log = TrainingLog(self.accelerator, self.run_directory.log, resumed_from)

    def _clear_directory(self) -> None:
        """Of an earlier run nothing is left; of a killed one, what its newest state knows."""
        directory, best = self.run_directory, self.progress.best
        if self.state is None:
            directory.clear()
        elif self.state in directory.states()[-1:]:
            directory.clear_leftovers({model.path for model in best}, self.state)
            if best and not directory.best_is(best[0].path):
                directory.point_best_to(best[0].path)

    # The run

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
            while not interrupted and not self.schedule.run_is_over(self.progress):
                interrupted = self._train_interval() or self._end_interval()
            if interrupted:
                self._save_state()
        last = self.run_directory.last
        if not interrupted:
            self._require_finite()
            self._gather()
            save_model(self.accelerator, last, self._save_model, self.progress.last_metrics)
        result = self._result(interrupted, None if interrupted else str(last))
        self.pictures.draw_curves()
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

    def _train_interval(self) -> bool:
        """Train to the end of the evaluation interval; `True` if a request to stop came before."""
        progress, options, schedule = self.progress, self.options, self.schedule
        loader = self.data.loader(
            progress.epoch,
            progress.batches,
            num_workers=options.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        self.pace.start()
        training_mode(self.model)
        # A run that ends by the clock does not know its last step: its bar is that of the epoch.
        by_clock = options.max_minutes is not None
        first_step = progress.epoch * schedule.steps_per_epoch if by_clock else 0
        last_step = first_step + schedule.steps_per_epoch if by_clock else schedule.total_steps
        bar = tqdm(
            desc=f"Epoch {progress.epoch + 1}/{options.epochs}",
            initial=progress.step - first_step,
            total=min(last_step, schedule.total_steps) - first_step,
            disable=not self.accelerator.is_main_process,
            bar_format=BAR,
        )
        with bar, iterating(loader) as batches:
            while not schedule.interval_is_over(progress):
                rates = learning_rates(self.optimizer)
                count = schedule.batches_of_next_step(progress)
                stop = self.optimizer_step(batches, count)
                progress.step += 1
                progress.batches += count
                at_end, save_due = schedule.interval_is_over(progress), schedule.state_is_due(progress)
                self.threads.after_step(self.pace.end_step())
                if at_end or stop or save_due or progress.step % options.log_every == 0:
                    self.log.write_training(progress, schedule.epochs_done(progress), rates)
                bar.set_postfix({**self.log.shown, "left": as_duration(self.pace.seconds_left())}, refresh=False)
                bar.update()
                if stop or (save_due and not at_end):
                    self._save_state()
                if stop:
                    return True
        return False

    def _end_interval(self) -> bool:
        """Evaluate and save the state, each if due; `True` if a request to stop came before the evaluation's end."""
        progress = self.progress
        before = progress.epoch, progress.batches
        if self.schedule.epoch_is_over(progress):
            progress.epoch, progress.batches = progress.epoch + 1, 0
        if self.data.evaluation is not None and self.schedule.evaluation_is_due(progress):
            try:
                with self.pace.evaluating():
                    self._evaluate()
            except InterruptedEvaluationError:  # the resumed run evaluates first
                progress.epoch, progress.batches = before
                return True
        progress.closed_step = progress.step
        if self.schedule.state_is_due(progress):
            self._save_state()
            self.best_models.remove_others(progress)
        return False

    def _is_plain(self, batch: int) -> bool:
        """Whether the images of a batch of the epoch, counted from 0, are not mixed with others any more."""
        schedule = self.schedule
        step_of_epoch = batch // self.options.gradient_accumulation_steps
        return schedule.is_plain(self.progress.epoch * schedule.steps_per_epoch + step_of_epoch)

    # A step

    def optimizer_step(self, batches: Iterator[Any], count: int) -> bool:
        """One step on the mean loss of the next `count` batches; returns whether some process was asked to stop.

        If the time is up on some process, this step becomes the last.
        """
        stop = False
        self.optimizer.zero_grad()
        self.guard.begin_step()
        for index in range(count):
            batch = next(batches)
            self._note_unreadable(batch.pop("unreadable"))
            self.guard.note_images(batch, batch.pop("mixed_with", {}))
            batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
            # Gradients are averaged over processes once, in the backward pass of the last batch.
            with nullcontext() if index == count - 1 else self._without_reduction():
                loss, terms, problem = self._loss(batch)
                stop |= self._agree_to_go_on(loss, terms, problem)
                self.accelerator.backward(loss / count)
            self.log.add({"loss": loss, **terms}, images=len(batch["pixel_values"]))
        max_norm = self.options.clip_max_norm or float("inf")
        norm = whole(self.accelerator.clip_grad_norm_(self.parameters, max_norm))
        self.guard.note_gradient(norm)
        self.log.add({"grad_norm": norm})
        self.optimizer.step()
        self.scheduler.step()
        if self.average is not None:
            self._gather()
            self.average.update(self.progress.step + 1)
        return stop

    def _without_reduction(self) -> AbstractContextManager:
        """Within, gradients are added up on each process and not averaged over all."""
        return self.accelerator.no_sync(self.model) if self.shards is None else self.shards.without_reduction()

    def _note_unreadable(self, images: dict[int, str]) -> None:
        """Say once of an image that it cannot be read, and leave it out from here on, in a resumed run too."""
        for index, reason in images.items():
            if index not in self.progress.unreadable:
                self.progress.unreadable.append(index)
                logger.warning(f"{reason} Another one takes its place.", main_process_only=False)

    def _loss(self, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], str]:
        """Loss, its terms, and what is wrong with the predictions, if they are too broken to have a loss."""
        autocast = nullcontext() if self.shards is None else self.accelerator.autocast()  # prepared models have it
        try:
            with autocast:
                outputs = self.model(
                    pixel_values=batch["pixel_values"], pixel_mask=batch.get("pixel_mask"), labels=batch["labels"]
                )
        except FloatingPointError as error:
            return torch.full((), torch.nan, device=self.accelerator.device), {}, str(error)
        return outputs.loss, outputs.loss_dict, ""

    def _agree_to_go_on(self, loss: torch.Tensor, terms: dict[str, torch.Tensor], problem: str) -> bool:
        """Stop all processes together on a loss that is not finite, and let them end together when the time is up by
        the clock of the main process; returns whether some process was asked to stop.

        This waits for the device once in a forward pass, right after the matching has done so anyway.
        """
        time_used = self.pace.part_of_time() if self.accelerator.is_main_process else 0.0
        flags = [flag.float().reshape(1) for flag in self.guard.flags(loss)]
        flags.append(loss.new_tensor([self.stop_request.requested, time_used], dtype=torch.float32))
        broken, overflown, stop, self.schedule.time_used = self.accelerator.reduce(
            torch.cat(flags), reduction="sum"
        ).tolist()
        if self.schedule.time_used >= 1:
            self.schedule.total_steps = self.progress.step + 1
        if broken:
            self.guard.report_step(loss, terms, problem, self.state)
        self.guard.count_overflow(bool(overflown), self.state)
        return bool(stop)

    # Evaluation and saving

    def _evaluate(self) -> None:
        """Evaluate what would be saved, and keep it if it is among the best."""
        progress = self.progress
        self._gather()
        for model in self._models:
            for buffer in model.buffers():  # batch norm statistics of the main process, whose model is saved
                broadcast(buffer)
        self._require_finite()
        result = self._evaluated(self._models[0])
        metrics = result.metrics
        progress.last_metrics = dict(metrics)
        epochs_done = self.schedule.epochs_done(progress)
        self.log.write_evaluation(progress, epochs_done, metrics)
        logger.info(f"Epoch {epochs_done:g}: AP {as_percent(metrics['ap']).strip()}")
        if self.options.eval_without_ema:
            without = self._evaluated(self._models[-1]).metrics
            self.log.write_evaluation(progress, epochs_done, without, kind="eval_without_ema")
            logger.info(f"Epoch {epochs_done:g}: AP {as_percent(without['ap']).strip()} without the average")
        epoch = progress.epoch + bool(progress.batches)  # one that is under way counts
        self.best_models.offer(progress, epoch, metrics, self._save_model)
        self._note_patience(metrics["ap"])
        is_best = bool(progress.best) and progress.best[0].step == progress.step
        self.pictures.draw_predictions(result, progress.step, best=is_best)
        self.pictures.draw_curves()

    def _gather(self) -> None:
        """Bring what is evaluated and saved up to date, if it is a copy; every process must call this."""
        if self.shards is not None:
            self.shards.gather()

    def _note_patience(self, ap: float) -> None:
        """Let the schedule know, and say what comes of it."""
        was_lost = self.schedule.patience_is_lost(self.progress)
        self.schedule.note_evaluation(self.progress, ap)
        if self.schedule.patience_is_lost(self.progress) and not was_lost:
            decays = f"The learning rate falls to 0 until step {self.schedule.total_steps}."
            logger.info(
                f"The AP has not improved over {100 * self.progress.reference_ap:.2f} in "
                f"{self.progress.stale_evaluations} evaluations. "
                f"{'The run ends.' if self.progress.decay_from is None else decays}"
            )

    def _evaluated(self, model: PreTrainedModel) -> EvaluationResult:
        options = self.options
        try:
            return evaluate_detector(
                model,
                self.data.image_processor,
                self.data.require_evaluation(),
                accelerator=self.accelerator,
                should_stop=lambda: self.stop_request.requested,
                batch_size=options.batch_size,
                num_workers=options.num_workers,
                on_bad_image=options.on_bad_image,
                max_detections=options.max_detections,
                area_boundaries=areas_of_sizes(options.size_boundaries),
            )
        except FloatingPointError as error:
            raise NonFiniteLossError(f"in the evaluation after step {self.progress.step}: {error}") from error

    def _require_finite(self) -> None:
        """Refuse to evaluate or save a model, or the state of its optimizer, that is not finite; on all processes."""
        self.guard.require_finite(self.model, self.optimizer, self.state)

    def _save_state(self) -> None:
        self._require_finite()
        self.progress.unreadable = sorted(set(gather_object(self.progress.unreadable)))
        self.state = save_state(
            self.accelerator,
            self.run_directory,
            self.progress,
            self.scheduler,
            self._fingerprint,
            dataclasses.replace(self.computation, threads=self.threads.threads).to_dict(),
            self.average,
            self.shards,
        )

    def _save_model(self, directory: Path) -> None:
        """Write the model as it is evaluated, and its card."""
        model, data = self._models[0], self.data
        model.save_pretrained(directory)
        data.image_processor.save_pretrained(directory)
        card = make_card_of_run(
            model.config, self.options, data.train, data.evaluation, self.progress, self.accelerator.num_processes
        )
        (directory / CARD_FILE).write_text(f"{card}\n", encoding="utf-8")

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
            stopped_early=not interrupted and self.schedule.ended_early(self.progress),
        )
