"""DLRM, the Deep Learning Recommendation Model, trained on Ascend NPU, GPU or CPU.

Naumov et al., arXiv 1906.00091.

python dlrm_s_pytorch.py --mini-batch-size=2 --data-size=6
torchrun --nproc_per_node=8 dlrm_s_pytorch.py --data_path=DIR --use-gpu ...
"""

import os

from common.versions import demand

demand(__name__, "torch", "numpy", "numba", "tqdm")

# Importing torch must not import torch_npu, which fails if CANN is broken; --use-npu imports it.
# This line has to come before the first import of torch.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import common.compiled  # noqa: F401  (before torch: both use the same threads)
from common.imports import garbage_left_alone

with garbage_left_alone():
    import torch

# isort: split
import argparse
import io
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from checkpoints.agreement import joined_in_agreement
from checkpoints.checkpoints import NoCheckpoints, make_checkpoints
from checkpoints.export import check_export_options, export_checkpoint
from checkpoints.options import CheckpointOptions, add_checkpoint_options
from checkpoints.run_state import Place, RunState
from common.errors import UserError, reports_errors
from common.flags import ArgumentParser
from common.phases import each_in_phase, phase
from common.termination import ends_on_signals, skip_clean_up_if_ended
from criteo.columns import NUM_DENSE
from criteo.prepared import Prepared
from criteo.spec import DataSpec, add_data_options
from data_utils import prepare
from devices.execution import (
    Execution,
    add_device_options,
    add_execution_options,
    add_gpu_options,
)
from devices.gpu import set_product_precision
from devices.memory import out_of_memory_told
from devices.npu import set_jit_compile
from devices.threads import set_up_threads
from dlrm_data_pytorch import (
    BatchedDataset,
    RandomSpec,
    RunData,
    batch_order,
    describe_batches,
    load_batches,
    make_criteo_data,
    make_random_data,
)
from engine.architecture import Architecture, add_model_options
from engine.loss_meter import LossMeter
from engine.model_file import (
    ModelState,
    check_model_paths,
    full_state_dict,
    load_model_file,
    load_parameters,
)
from engine.onnx_export import check_onnx_options, export_if_asked
from engine.options import (
    PERFORMANCE_LINES,
    add_loss_options,
    add_mlperf_options,
    add_model_file_options,
    add_reporting_options,
    add_source_options,
    add_training_options,
    check_together,
    evaluation_batch_size,
)
from engine.prediction import Prediction, predict
from engine.prediction_options import ServedData, add_prediction_options, take_model_flags
from engine.previous_file import save_model
from engine.progress import Progress, is_better
from engine.quantization import (
    check_quantization,
    is_quantized,
    mlps_take_whole_batches,
    quantize,
)
from engine.score_meter import ScoreMeter
from engine.self_check import run_self_check
from engine.serving_facts import ServingFacts, lacks_vocabulary, vocabulary_to_keep
from engine.step import Accumulation, Chunking, StepParts, TrainingStep
from engine.step_clock import StepClock
from engine.step_graph import check_graphs
from engine.table_layout import TableLayout, add_table_options, print_plan
from model.batch import Batch, Decoding, Features
from model.compression import add_compression_options, compression_from_options
from model.embedding_tables import EmbeddingTables, PoolingWeights
from model.interaction import make_interaction
from model.layer_operators import Target
from model.lower_mlp import flatten_if_lower
from model.mlp import MLP
from model.routed_exchange import make_exchange
from model.travel import Types
from optim.lr_schedule import LearningRateSchedule
from optim.update import Update
from ranks.process import Process, this_process
from reporting.compute_graph import GRAPH_FILE, GRAPH_FLAG, plot_if_asked
from reporting.drawing import check_drawable
from reporting.log_lines import StepPosition, speed_line
from reporting.metrics import Metrics
from reporting.mlperf_submission import check_submission
from reporting.profiling import profiled
from reporting.records import EvaluationRecord, TrainingRecord
from reporting.report import check_report_options
from reporting.reporter import Reporter
from reporting.reporters import make_reporter
from reporting.run_facts import facts_of_tables, find_facts
from reporting.run_folder import add_run_options, run_folder, use_run_folder

# ---------------------------------------------------------------- options


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line.

    Raises:
        UserError: a flag is wrong, or flags contradict one another.
    """
    parser = make_parser()
    options: argparse.Namespace = parser.parse_args(argv)
    take_model_flags(options, parser.names_given(argv) if options.predict_file else set())
    _check_options(options)
    use_run_folder(options, parser)
    if options.data_path:
        options.data_generation = "dataset"
    return options


def make_parser() -> ArgumentParser:
    """The parser of all flags, in groups."""
    parser = ArgumentParser(
        prog="dlrm_s_pytorch.py", description="Trains a deep learning recommendation model."
    )
    model = (add_model_options, add_compression_options, add_loss_options)
    data = (add_source_options, add_data_options)
    training = (add_training_options, add_device_options, add_execution_options, add_gpu_options)
    kept = (add_table_options, add_checkpoint_options)
    results = (add_reporting_options, add_model_file_options, add_prediction_options)
    last = (add_mlperf_options, add_run_options)
    for add_options in (*model, *data, *training, *kept, *results, *last):
        add_options(parser)
    return parser


def _check_options(options: argparse.Namespace) -> None:
    """Raise a UserError for a mistake that no single flag's type can see."""
    check_together(options)
    check_submission(options)
    check_quantization(options)
    CheckpointOptions.from_options(options)
    check_export_options(options)
    check_model_paths(options.load_model, options.save_model)
    check_report_options(options)
    check_onnx_options(options)
    if options.plot_compute_graph:
        check_drawable(GRAPH_FLAG, GRAPH_FILE)
    compression_from_options(options)
    LearningRateSchedule.from_options(options)


# ---------------------------------------------------------------- model


class DLRM_Net(nn.Module):  # noqa: N801 (the name that users know)
    """Embedding bags, bottom MLP, interaction, top MLP (arXiv 1906.00091, figure 1).

    The names emb_l, bot_l, top_l and v_W_l are frozen: they are the keys of model files.

    Args:
        architecture: the shape.
        process: this rank; it holds its share of the tables, and both MLPs.
        optimizer: what updates the rows of tables: sgd, adagrad or rwsadagrad.
        execution: how the device is used.
        layout: of the tables on ranks; None: whole tables.
        draws: draw the tables' initial values, a minute for 15 GB; else they are 0, to be loaded.
    """

    def __init__(
        self,
        architecture: Architecture,
        process: Process,
        optimizer: str,
        execution: Execution = Execution(),  # noqa: B008 (it is frozen)
        layout: TableLayout | None = None,
        draws: bool = True,
    ) -> None:
        super().__init__()
        self.architecture, tables = architecture, architecture.tables
        layout = layout or TableLayout.of_whole_tables(architecture, process.world_size)
        types = Types(execution.lower or torch.float32, layout.wire)
        exchange = make_exchange(process, tables, layout.placement, types)
        self.emb_l = EmbeddingTables(
            tables, exchange, optimizer, architecture.learned_pooling, execution
        )
        if draws:
            self.emb_l.initialise(layout.seed)
        if architecture.learned_pooling:
            self.v_W_l = PoolingWeights(self.emb_l)
        self.bot_l = MLP(architecture.bottom, nn.ReLU(), process.device, execution.lower)
        self.top_l = MLP(architecture.top, nn.Sigmoid(), process.device, execution.lower)
        self.interact = make_interaction(architecture, process.device, execution.triton)
        self.flat_parameters = flatten_if_lower([self.bot_l, self.top_l], execution)
        self.decoding = Decoding(execution.triton, self.bot_l.wanted_type, exchange.shifts)

    def forward(
        self,
        features: Features,
        rows_per_rank: Sequence[int],
        update: Update | None = None,
        target: Target | None = None,
    ) -> torch.Tensor:
        """Click probabilities (b, 1) of this rank's b rows; all ranks call it together.

        Args:
            features: those of this rank's b rows.
            rows_per_rank: rows of the batch on each rank.
            update: what the backward pass does with the gradients; None: no such pass follows.
            target: for a top MLP that `computes_loss`: the result is that of all rows, ().
        """
        sgd_lr = float(update.lr) if update is not None and update.dense_now else None
        with phase("embedding"):
            pending = self.emb_l.begin(features.bags, rows_per_rank, update)
        with phase("MLPs"):
            dense = self.bot_l(features.dense, sgd_lr, is_fast=target is not None)
        with phase("embedding"):
            pooled = pending.wait()
        with phase("interaction"):
            joined_vectors = self.interact(dense, pooled)
        with phase("MLPs"):
            if target is not None:
                return self.top_l.lower_layers.with_loss(joined_vectors, target)
            probability: torch.Tensor = self.top_l(joined_vectors, sgd_lr)
        clamp = self.architecture.clamp
        return probability.clamp(clamp, 1 - clamp) if clamp > 0 else probability

    def dense_parameters(self) -> list[nn.Parameter]:
        """The parameters of both MLPs, which are the same on all ranks."""
        return [*self.bot_l.parameters(), *self.top_l.parameters()]


# ---------------------------------------------------------------- training


class EvaluationLeftError(Exception):
    """An evaluation was left because a signal has come."""


class Evaluator:
    """Evaluates a model as it is.

    Args:
        options: the parsed command line.
        process: this rank.
        model: the model.
        execution: how the device is used.
    """

    def __init__(
        self, options: argparse.Namespace, process: Process, model: DLRM_Net, execution: Execution
    ) -> None:
        self._options, self._process = options, process
        self._model, self._execution = model, execution

    @torch.no_grad()
    def metrics(
        self, data: BatchedDataset, reporter: Reporter, is_asked: Callable[[], bool]
    ) -> Metrics:
        """Metrics over all rows, on every rank.

        Args:
            data: the evaluation batches.
            reporter: is told of each batch, and of the scores' curves.
            is_asked: whether to leave the evaluation, asked after each batch.

        Raises:
            UserError: a prediction is nan.
            EvaluationLeftError: it was asked to leave.
        """
        options, process = self._options, self._process
        workers = options.test_num_workers
        workers = options.num_workers if workers < 0 else workers
        size = evaluation_batch_size(options)
        chunking = Chunking.of_data(len(data), size, process, self._execution)
        if mlps_take_whole_batches(options):
            chunking = Chunking(process.device)
        scores = ScoreMeter(process, reporter.wants_page)
        for batch in _load(data, range(len(data)), workers, process, self._execution):
            for chunk in chunking.chunks(batch):
                features = chunk.decode(self._model.decoding)
                predicted = self._model(features, chunk.rows_per_rank)
                count = chunk.num_rows - chunk.num_padding
                scores.add(predicted[:count], features.label[:count])
            reporter.end_evaluation_batch(sum(batch.rows_per_rank))
            if is_asked():
                raise EvaluationLeftError
        found = scores.metrics()
        if scores.curves is not None:
            reporter.note_curves(scores.curves)
        if math.isnan(found.accuracy):
            raise UserError("predictions are nan: the model's parameters are not finite")
        return found


def _load(
    data: BatchedDataset,
    order: Sequence[int],
    workers: int,
    process: Process,
    execution: Execution,
) -> Iterable[Batch]:
    return each_in_phase("load", load_batches(data, order, workers, process.device, execution))


def make_model_state(
    options: argparse.Namespace,
    process: Process,
    data: RunData,
    model: DLRM_Net,
    parts: StepParts,
) -> ModelState:
    """What files save of a model in training, and what they tell about it."""
    return ModelState(
        process=process,
        model=model,
        tables=model.emb_l,
        dense_optimizer=parts.optimizer,
        optimizer_name=options.optimizer,
        num_epochs=options.nepochs,
        num_batches=data.batches_of_epoch(options.num_batches),
        num_test_batches=len(data.test),
        scale=parts.scale,
        serving=ServingFacts.from_options(options, data.num_rows, data.num_dense, data.vocabulary),
        vocabulary=data.vocabulary,
    )


class Trainer:
    """A model in training: decides when to print, evaluate, save and stop."""

    def __init__(
        self,
        options: argparse.Namespace,
        process: Process,
        data: RunData,
        reporter: Reporter,
        checkpoints: NoCheckpoints = NoCheckpoints(),  # noqa: B008 (it has no state)
    ) -> None:
        architecture = Architecture.from_options(options, data.num_rows, data.num_dense)
        self.options, self.process, self.data, self.reporter = options, process, data, reporter
        self.execution = Execution.from_options(options, process.device)
        name, draws = options.optimizer, not checkpoints.will_restore
        layout = TableLayout.from_options(options, architecture, process)
        self.model = DLRM_Net(architecture, process, name, self.execution, layout, draws)
        self.num_batches = data.batches_of_epoch(options.num_batches)
        self.accumulation = Accumulation(options.mlperf_grad_accum_iter, self.num_batches)
        self.schedule = LearningRateSchedule.from_options(options)
        parts = StepParts.from_options(options, self.model, process.device, self.execution)
        size, skips = options.mini_batch_size, options.on_nan == "skip"
        chunking = Chunking.of_data(len(data.train), size, process, self.execution)
        self.step = TrainingStep(parts, process, self.execution, chunking, skips)
        self.evaluator = Evaluator(options, process, self.model, self.execution)
        self.progress = Progress(is_seeded=layout.seed is not None)
        self.losses, self.place = LossMeter(process, skips), Place()
        self.checkpoints = checkpoints
        self.state = make_model_state(options, process, data, self.model, parts)
        self.continues = False  # from a model file or a checkpoint: weights are not fresh
        self._by_auc = options.mlperf_logging  # the best model has the best AUC, else accuracy
        self._evaluates = options.test_freq > 0 and not options.performance
        self._clock, self._lr, self._lines = StepClock(), options.learning_rate, 0

    @property
    def run(self) -> RunState:
        """The run as checkpoints save it."""
        return RunState(self.state, self.progress, self.losses, self.data.train, self.place)

    def begin(self) -> None:
        """Go on from a checkpoint or a model file if the flags ask for it."""
        if text := lacks_vocabulary(self.options, self.data.vocabulary):
            self.reporter.say(text)
        if self.options.load_model:
            self.load(self.options.load_model)
        if self.checkpoints.begin(self.run):
            self.continues = True
            self.reporter.note_continued("a checkpoint (--resume)")

    def load(self, path: str) -> None:
        """Continue from a model file, or with --inference-only take its parameters."""
        if self.options.inference_only:
            self.progress = load_parameters(path, self.model, self.model.emb_l)
        else:
            accumulate = self.options.mlperf_grad_accum_iter
            self.progress = load_model_file(path, self.state, accumulate)
        self.continues = True

    def train(self, after_step: Callable[[], None]) -> None:
        """Train all epochs that are left; ends early at a threshold or with --performance."""
        progress, shape = self.progress, self.model.architecture
        self.reporter.begin_run(
            rows_before(self, self.num_batches), self.data.test.num_rows, shape.bottom, shape.top
        )
        if self.place.owes_evaluation:
            self._evaluate_at_step()
        is_over = (progress.epoch, progress.iter) >= (self.options.nepochs - 1, self.num_batches)
        if is_over:
            done = f"{self.options.nepochs} epoch(s) are done"
            self.reporter.say(f"nothing left to train: {done}; --nepochs can be more")
        elif not self._has_enough():
            self._train_epochs(after_step)
        # the best value may be that of a model that was loaded: this run has chosen none
        none_chosen = not self._evaluates or math.isnan(self._best())
        is_same = is_over and self.options.load_model  # as the file that was loaded
        if self.options.save_model and not progress.saved and none_chosen and not is_same:
            self._save()  # also after a resume: the last checkpoint is older than this file
        self.checkpoints.finish(self.run)
        if text := progress.last_line(self._by_auc, self.options.save_model):
            self.reporter.say(text)

    def _train_epochs(self, after_step: Callable[[], None]) -> None:
        progress = self.progress
        for epoch in range(progress.epoch, self.options.nepochs):
            begin = progress.resume_iter if epoch == progress.epoch else 0
            if not self._train_epoch(epoch, begin, after_step):
                break
        self.reporter.end_run()
        self.step.close()

    def _train_epoch(self, epoch: int, begin: int, after_step: Callable[[], None]) -> bool:
        """Train from batch `begin` on; returns False if training must stop."""
        replayed = self.progress.iter if epoch == self.progress.epoch else 0
        where = StepPosition(max(begin, replayed), self.num_batches, epoch)
        num_rows, num_done = rows_before(self, self.num_batches), rows_before(self, where.it)
        self.reporter.begin_epoch(where, num_rows, num_done)
        self._clock.start()
        numbers = batch_order(self.options, self.num_batches, epoch)[begin:]
        workers = self.options.num_workers
        batches = _load(self.data.train, numbers, workers, self.process, self.execution)
        for it, batch in enumerate(batches, begin + 1):
            loss = self.train_step(batch, it)
            if it <= replayed:  # repeated for the gradients of an unfinished accumulation
                continue
            num_rows = sum(batch.rows_per_rank)
            self.losses.add(loss, num_rows, it, epoch)
            self.progress.note_batch(epoch, it)
            self._clock.note_step(num_rows)
            self.reporter.end_step(num_rows)
            after_step()
            goes_on = self._after_step(it, epoch)
            self.checkpoints.after_step(self.run)
            if not goes_on:
                return False
        return True

    def train_step(self, batch: Batch, it: int) -> torch.Tensor:
        """Train on batch `it` of the epoch, from 1; returns this rank's share of the loss."""
        self._lr = lr = self.schedule.rate(self.progress.num_steps + 1)
        is_due = self.accumulation.is_due(it)
        num_sharing = self.accumulation.num_sharing(it)
        share, has_updated = self.step.run(batch, lr, num_sharing, is_due)
        if is_due:
            self.progress.note_due(it, has_updated)
            self.place.next_draw = batch.state_after
        return share

    def _after_step(self, it: int, epoch: int) -> bool:
        """Print, evaluate and save when it is time; returns False if training must stop."""
        options, is_last = self.options, it == self.num_batches
        evaluates = self._evaluates and (it % options.test_freq == 0 or is_last)
        if it % options.print_freq == 0 or is_last or evaluates:
            self._print_line(it, epoch)
        if evaluates:
            self._evaluate_at_step()
        is_measured = options.performance and self._lines >= PERFORMANCE_LINES
        return not (self._has_enough() or is_measured)

    def _evaluate_at_step(self) -> None:
        """Evaluate and save the best model; if a signal comes, save the run and end instead."""
        self.place.owes_evaluation = True  # until it is done
        try:
            with phase("evaluation"):
                self.evaluate_and_save()
        except EvaluationLeftError:
            self.checkpoints.save_and_end(self.run)
        self.place.owes_evaluation = False
        self._clock.start()

    def _print_line(self, it: int, epoch: int) -> None:
        loss = self.losses.mean()  # waits for the device, so the pace is that of whole steps
        pace = self._clock.take()
        self._lines += 1
        self.progress.train_loss = loss
        for warning in (self.losses.take_warning(), self.state.scale.take_warning()):
            if warning:
                self.reporter.say(warning)
        where = StepPosition(it, self.num_batches, epoch)
        self.reporter.training(TrainingRecord(where, loss, self._lr, *pace))

    def evaluate_and_save(self) -> None:
        """Evaluate, report, and save the model if it is the best so far."""
        best_before = self._best()
        self.evaluate_and_report()
        if self.options.save_model and is_better(self._best(), best_before):
            self._save()

    def evaluate_only(self) -> None:
        """Evaluate and report the model as it is, for --inference-only."""
        if not self.options.load_model:
            text = "warning: --inference-only without --load-model evaluates random weights"
            self.reporter.say(text)
        quantize(self.model, self.options, self.process, self.reporter.say)
        seconds = self.evaluate_and_report()
        if is_quantized(self.options):
            self.reporter.say(speed_line(self.data.test.num_rows, seconds))

    def evaluate_and_report(self) -> float:
        """Evaluate, note the metrics in the progress, and report them; returns the seconds."""
        progress = self.progress
        where = StepPosition(progress.iter, self.num_batches, progress.epoch)
        num_rows, begin = self.data.test.num_rows, time.perf_counter()
        self.reporter.begin_evaluation(where, num_rows)
        found = self.evaluate()
        progress.note_evaluation(found)
        best, seconds = (progress.best_accuracy, progress.best_auc), time.perf_counter() - begin
        self.reporter.evaluation(EvaluationRecord(where, found, *best, num_rows, seconds))
        return seconds

    def evaluate(self) -> Metrics:
        """Metrics over all evaluation rows, on every rank."""
        is_asked = self.checkpoints.is_asked_in_evaluation
        return self.evaluator.metrics(self.data.test, self.reporter, is_asked)

    def _save(self) -> None:
        text = save_model(
            self.options.save_model, self.state, self.progress, self._by_auc, self.continues
        )
        if text:
            self.reporter.say(text)

    def _best(self) -> float:
        """The best value so far of the metric that decides which model is saved."""
        return self.progress.best(self._by_auc)

    def _has_enough(self) -> bool:
        """Whether a threshold is reached, or --patience has come to its end; if so, report it."""
        options = self.options
        sentence = self.progress.threshold_reached(
            options.mlperf_acc_threshold, options.mlperf_auc_threshold
        )
        if not sentence:
            sentence = self.progress.patience_over(options.patience, self._by_auc)
            self.reporter.note_stopped(sentence)
        if sentence:
            self.reporter.say(sentence)
        return bool(sentence)


def rows_before(trainer: Trainer, num_batches: int) -> int:
    """Rows of so many batches from an epoch's begin on, over all ranks."""
    return min(trainer.data.train.num_rows, num_batches * trainer.options.mini_batch_size)


# ---------------------------------------------------------------- main


def make_process(options: argparse.Namespace) -> Process:
    """Find this rank and its device, and set the device up as the flags ask.

    Raises:
        UserError: the device is not there, or cannot do what a flag asks for.
    """
    device = "npu" if options.use_npu else "cuda" if options.use_gpu else "cpu"
    process = this_process(device, options.local_rank, options.dist_backend or "")
    Execution.from_options(options, process.device)  # raises its errors before data is prepared
    set_jit_compile(process.device, options.jit_compile)
    set_product_precision(process.device, options.tf32)
    check_graphs(options, process)
    return process


def prepare_data(options: argparse.Namespace) -> Prepared | None:
    """Criteo data on disk, or None for other data; all ranks prepare it together."""
    if options.data_generation != "dataset" or options.predict_file:
        return None
    return prepare(DataSpec.from_options(options))


def make_data(options: argparse.Namespace, prepared: Prepared | None, process: Process) -> RunData:
    """Batches to train and to evaluate with."""
    if prepared is not None:
        in_memory = not (options.memory_map or options.mlperf_bin_loader)
        sizes = (options.mini_batch_size, evaluation_batch_size(options))
        data = make_criteo_data(
            prepared, options.data_randomize, in_memory, sizes, options.eval_split, process
        )
        return replace(data, vocabulary=vocabulary_to_keep(options, prepared))
    return make_random_data(RandomSpec.from_options(options), process)


def seed_everything(options: argparse.Namespace) -> None:
    """Seed numpy and torch, and set how many digits they print."""
    np.random.seed(options.numpy_rand_seed)
    np.set_printoptions(precision=options.print_precision)
    torch.set_printoptions(precision=options.print_precision)
    torch.manual_seed(options.numpy_rand_seed)


def print_debug(trainer: Trainer, title: str) -> None:
    """Print architecture, data and parameters on the first rank, with --debug-mode."""
    if not trainer.options.debug_mode:
        return
    state = full_state_dict(trainer.state)
    if trainer.process.is_first:
        print(trainer.model.architecture)
        print(describe_batches(trainer.data.train, max_batches=10))
        print(f"{title} parameters (weights and bias):")
        for name, value in state.items():
            print(name, value.numpy(), sep="\n")


def make_architecture(options: argparse.Namespace, prepared: Prepared | None) -> Architecture:
    """The model's shape, known before any data is read.

    Raises:
        UserError: the model does not fit the data.
    """
    if prepared is None:
        return Architecture.without_data(options)
    return Architecture.from_options(options, prepared.counts, NUM_DENSE)


def note_facts(trainer: Trainer, prepared: Prepared | None) -> None:
    """Tell the reporter what the page of --report shows of flags, machine, data and tables."""
    options, data, shape = trainer.options, trainer.data, trainer.model.architecture
    if not trainer.reporter.wants_page:
        return
    rows = {"train": data.train.num_rows, options.eval_split: data.test.num_rows}
    report = prepared.report() if prepared is not None else {}
    tables = facts_of_tables(shape.tables, trainer.model.emb_l.exchange.placement)
    facts = find_facts(make_parser(), options, tables, rows, trainer.process, report)
    trainer.reporter.note_facts(facts)


def show_plan(options: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Print where tables would be, for --print-plan, which needs no card; the exit status."""
    needs_data = "arch_embedding_size" not in make_parser().names_given(argv)
    prepared = prepare_data(options) if needs_data else None
    print_plan(options, make_architecture(options, prepared))
    return 0


def draw_if_asked(options: argparse.Namespace, prepared: Prepared | None, process: Process) -> None:
    """Draw the model, with --plot-compute-graph, or see that it can be made, with --dry-run."""
    if options.plot_compute_graph or options.dry_run:
        shape = make_architecture(options, prepared)
        placement = TableLayout.from_options(options, shape, process).placement
        plot_if_asked(options, shape, placement, process)


def predict_rows(options: argparse.Namespace, process: Process) -> int:
    """Score the rows of --predict-file with the model of --load-model; returns the exit status."""
    data = ServedData.from_options(options)
    execution = Execution.from_options(options, process.device)
    architecture = Architecture.from_options(options, data.num_rows, NUM_DENSE)
    layout = TableLayout.from_options(options, architecture, process)
    model = DLRM_Net(architecture, process, "sgd", execution, layout, draws=False)
    load_parameters(options.load_model, model, model.emb_l)
    out = sys.stderr if process.is_first else io.StringIO()
    quantize(model, options, process, lambda text: print(text, file=out))
    predict(options, Prediction.from_options(options, data, process, execution), model)
    return 0


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Train, or evaluate with --inference-only; returns the exit status."""
    options = parse_options(argv)
    if options.export_checkpoint:
        return export_checkpoint(options)
    if options.print_plan is not None:
        return show_plan(options, argv)
    process = make_process(options)
    if options.self_check:
        return run_self_check(main, process, options)
    with run_folder(options, process, make_parser()):
        return run(options, process)


def run(options: argparse.Namespace, process: Process) -> int:
    """Prepare the data, then train or evaluate as one rank; returns the exit status."""
    prepared = prepare_data(options)
    draw_if_asked(options, prepared, process)
    if options.dry_run:
        return 0
    if process.device.type == "cpu":
        set_up_threads(torch.get_num_threads())
    group = joined_in_agreement(options, prepared, process)
    # the reporter is outermost, so that it sees the errors that the others make of what they catch
    with (
        make_reporter(options, process) as reporter,
        ends_on_signals(reporter.end_run),
        group,
        out_of_memory_told(process.device),
        make_checkpoints(options, prepared, process, reporter.say) as checkpoints,
    ):
        seed_everything(options)
        if options.predict_file:
            return predict_rows(options, process)
        data = make_data(options, prepared, process)
        trainer = Trainer(options, process, data, reporter, checkpoints)
        note_facts(trainer, prepared)
        trainer.begin()
        print_debug(trainer, "initial")
        if options.inference_only:
            trainer.evaluate_only()
            export_if_asked(options, trainer.state, trainer.model.architecture, reporter.say)
            return 0
        profiling = profiled(options.enable_profiling, process, reporter)
        with profiling as after_step, checkpoints.training(trainer.run):
            trainer.train(after_step)
        print_debug(trainer, "updated")
        export_if_asked(options, trainer.state, trainer.model.architecture, reporter.say)
    return 0


if __name__ == "__main__":
    exit_status = main()
    skip_clean_up_if_ended(exit_status)
    sys.exit(exit_status)
