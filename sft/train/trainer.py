"""TRL's SFTTrainer with the model's own loss, exact token counting, whole checkpoints and an audit of gradients."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import AutocastKwargs
from sambay_kernels import token_statistics
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, set_seed
from trl import SFTTrainer

from sft.models.chunked_head import BESIDE_LABELS, unchunk_loss
from sft.models.four_bit import is_four_bit
from sft.train.agree import over_processes, sum_over_processes
from sft.train.audit import GradientAudit
from sft.train.checkpoints import MARKER, newest_whole, rotate, write_marker
from sft.train.collator import IGNORE, ROW_CUT, ROW_SUPERVISED
from sft.train.ema import Ema
from sft.train.engine import check_engine, whole_weights
from sft.train.finite import StepNumbers, weights_fault
from sft.train.gauges import Gauges
from sft.train.interrupt import leave_signals_to_the_run
from sft.train.marking import Marking
from sft.train.memorised import TokenSums
from sft.train.neftune import document_noise
from sft.train.objective import PLAIN_LOSS, Objective
from sft.train.optimizer import groups_of_its_own, regrouped, rounding, takes_decay
from sft.train.parallel.exchange import Ranks
from sft.train.parallel.groups import DataRanks, SameBlocks
from sft.train.parallel.share import RowShare
from sft.train.probe import LossScaling, accepted_inputs, takes, undisturbed
from sft.train.reshard import take_over, take_weights
from sft.train.sampler import Balance, EpochOrder, row_lengths
from sft.train.sharded import forward_only, is_sharded, shard
from sft.utils.distributed import alike
from sft.utils.errors import RestartError
from sft.utils.files import read_sealed

if TYPE_CHECKING:
    from sft.recipe.train_keys import TrainSection
    from sft.train.alerts import Alerts
    from sft.train.dropout import Drawn
    from sft.train.guarded import GuardedSteps
    from sft.train.space import Room
    from sft.train.watchdog import Watchdog


class SambayTrainer(SFTTrainer):
    """SFTTrainer for rows that are already prepared and packed.

    The loss of an optimizer step is the sum over all its supervised tokens, on every process and in every micro-batch,
    divided by their number, or by the sum of their weights. So 1x8, 2x4 and 8x1 micro-batches and any number of
    processes train the same.

    `loss_scaling` says how the model's own loss treats `num_items_in_batch` (sft.train.probe.loss_scaling);
    `objective` what a token's loss is, which its own forward has to know where that isn't plain cross entropy;
    `identity` is written into each checkpoint; `counters` continue from a checkpoint's; `sources` are the collator's.
    `train`: the stage's keys, where more than transformers' own arguments is wanted of them; `row_ranks`: the ranks
    that share this one's rows.
    """

    _tag_names = ["sambay-sft"]  # noqa: RUF012 (the parent's attribute)
    loss_is_scaled_for_ga: Any = True
    model: Any

    # What a stage sets, where it has them.
    ema: Ema | None = None
    guarded: GuardedSteps | None = None
    drawn: Drawn | None = None
    room: Room | None = None
    watchdog: Watchdog | None = None
    alerts: Alerts | None = None
    _gauges: Gauges | None = None
    other_engine = other_processes = False

    def __init__(
        self,
        model: Any,
        *,
        loss_scaling: LossScaling,
        identity: Mapping[str, Any],
        counters: Mapping[str, Any] | None = None,
        train: TrainSection | None = None,
        objective: Objective = PLAIN_LOSS,
        sources: Sequence[str] = (),
        row_ranks: Ranks | None = None,
        **kwargs: Any,
    ) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        own_forward = base.__dict__.get("forward")
        self.row_ranks = row_ranks
        self.sequence_parallel_size = 1 if train is None else train.sequence_parallel_size
        self.data_ranks = DataRanks.of(self.sequence_parallel_size)
        self._order: EpochOrder | None = None
        self._config_use_cache = getattr(base.config, "use_cache", None)
        if hasattr(model, "peft_config"):
            # The base has the embeddings; peft's default would ask the Hub at each save whether they were resized.
            model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
        # TRL rounds the adapters on weights in 4 bits to bfloat16, which small steps don't move.
        adapters = [(p, p.data) for p in model.parameters() if p.requires_grad and is_four_bit(model)]
        super().__init__(model=model, **kwargs)
        for parameter, data in adapters:
            parameter.data = data
        if kwargs["args"].gradient_checkpointing:
            # Autocast keeps what it has cast, weights too, to the end of the forward pass; a layer that is computed
            # again casts anew all the same.
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        if self.accelerator.ddp_handler is not None:
            # Gradients lie in the buffers that are exchanged, and not in memory of their own beside them.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        # TRL replaces the forward by one that leaves the model's own loss out; take the model's own back.
        base.__dict__.pop("forward", None)
        if own_forward is not None:
            base.forward = own_forward
        self.model_accepts_loss_kwargs = True
        # The parent's own noise would depend on a document's neighbours; _run_epoch makes ours.
        self.neftune_noise_alpha = None
        self.loss_scaling = loss_scaling
        self.identity = dict(identity)
        self.objective: Objective = objective
        kept = dict(counters or {})
        self._unlogged: dict[str, float] | None = kept.pop("unlogged", None)
        kept.pop("guard", None)
        self.token_sums = TokenSums(sources, kept.pop("token_sums", None))
        self.counters: dict[str, float] = {"tokens": 0, "supervised_tokens": 0, "seconds": 0.0, **kept}
        self._logged = dict(self.counters)
        self._clock: float | None = None
        self._audit: GradientAudit | None = None
        self._audited = False
        self._numbers, self.marking = StepNumbers(), Marking()
        self._per_token: int | None = None
        self._train = train
        self.ran_on: dict[str, Any] = {}
        self._parameter_names: list[list[str]] = []
        self.wanted_checkpoints: Callable[[int], Collection[int]] = lambda step: ()

    def restore_config(self) -> None:
        """Undo what training changes in the model's configuration and forward, before the model is handed on."""
        unchunk_loss(self.model)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if self._config_use_cache is not None:
            base.config.use_cache = self._config_use_cache

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that doesn't fill the model (the parent warns); tied weights are stored once."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        wrong = [name for name in load_result.missing_keys if name not in tied] + list(load_result.unexpected_keys)
        if wrong:
            raise RestartError(
                f"The checkpoint in {self.args.output_dir} doesn't fit the model ({len(wrong)} tensors missing or left "
                f"over, such as {wrong[0]}): start the stage again with --restart {self.identity.get('stage')}."
            )

    # ---- order of rows ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """Rows in an order that follows from data_seed and the epoch."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        strategy, block = self.args.train_sampling_strategy, self.args.train_batch_size
        if strategy == "sequential":
            return self._for_all_of_a_row(SequentialSampler(dataset))
        args, grouped, ranks = self.args, strategy == "group_by_length", self.data_ranks.count
        # Packs are as good as equally long.
        packed = self._train is not None and self._train.packing
        self._order = EpochOrder(
            len(dataset),
            seed=args.seed if args.data_seed is None else args.data_seed,
            lengths=row_lengths(dataset) if grouped or not packed else None,
            group=block * args.gradient_accumulation_steps * ranks,
            grouped=grouped,
            balance=None if packed else Balance(block, ranks),
        )
        return self._for_all_of_a_row(self._order)

    def _for_all_of_a_row(self, order: Sampler[int]) -> Sampler[int]:
        """The order for ranks that accelerate gives micro-batches in turn: those that share a row get the same."""
        if self.row_ranks is None:
            return order
        return SameBlocks(order, self.args.train_batch_size, self.row_ranks.size)

    def rows_of(self, step: int) -> list[int]:
        """The numbers of the rows that an optimizer step takes in, on all processes."""
        args: Any = self.args
        epoch, place = divmod(step - 1, self.steps_of_an_epoch)
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.data_ranks.count
        rows = len(self.train_dataset)  # type: ignore[arg-type]
        order = list(range(rows)) if self._order is None else self._order.of_epoch(epoch)
        return order[place * size : (place + 1) * size]

    def get_train_dataloader(self) -> Any:
        """The parent's, with workers that outlive a signal to all processes of a job: the step has to be finished."""
        loader: Any = super().get_train_dataloader()
        if self.args.dataloader_num_workers:
            # accelerate's loader wraps the one that starts them.
            inner = getattr(loader, "base_dataloader", loader)
            inner.worker_init_fn = functools.partial(_start_loader_worker, inner.worker_init_fn)
        return loader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """One epoch, in that epoch's order."""
        if self._order is not None:
            self._order.current_epoch = kwargs["epoch"]
        if self.drawn is not None:
            self.drawn.epoch = kwargs["epoch"]
        alpha = self.args.neftune_noise_alpha
        model, seed = self.accelerator.unwrap_model(self.model), self.args.seed
        with document_noise(model, alpha, seed=seed, epoch=kwargs["epoch"]) if alpha else nullcontext():
            super()._run_epoch(*args, **kwargs)

    # ---- counting ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of one optimizer step, and the number of supervised tokens in it on all processes, or the
        sum of their weights.

        Those without a supervised token come first. They aren't run where no process has one, but for the last: it
        sends the gradients on, and gives a step that supervises nothing its gradients of zero.
        """
        self._restore_unlogged()
        if self.guarded is not None:
            self.guarded.begin()
        with self.gauges.waiting():
            batches = list(itertools.islice(epoch_iterator, num_batches))
        # The row's, where this is a share: all that share it must come to it together.
        batches.sort(key=lambda batch: batch.get(ROW_SUPERVISED, batch["num_supervised"]) > 0)
        supervised = [batch["num_supervised"] for batch in batches]
        tokens, *everywhere = over_processes([sum(batch["num_tokens"] for batch in batches), *supervised])
        for batch, count in zip(batches[:-1], everywhere[:-1], strict=True):
            batch["skipped"] = count == 0
        self.counters["tokens"] += tokens
        self.counters["supervised_tokens"] += sum(everywhere)
        total: float = sum(everywhere)
        if self.objective.weighted:
            total = sum_over_processes(math.fsum(batch["num_weighted"] for batch in batches))
        self._tick()
        # torch.full, not torch.tensor: bringing a number to a GPU waits for it.
        kind = torch.float64 if self.objective.weighted else torch.int64
        return batches, torch.full((), total, dtype=kind, device=device)

    def _tick(self) -> None:
        now = time.perf_counter()
        if self._clock is not None:
            self.counters["seconds"] += now - self._clock
        self._clock = now

    # ---- loss ----

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss of this micro-batch: its summed token losses over the whole step's supervised tokens.

        Without a step (`num_items_in_batch` None) it is the mean cross entropy of the micro-batch, whatever is trained.
        A micro-batch without a supervised token is run with one made-up label and weight zero, so that every parameter
        takes part in every backward pass on every process. A share of a row, which may have no token at all, is run as
        it is: the model that it is of gives every parameter a gradient of zero.
        """
        supervised = int(inputs["num_supervised"])
        weight = 1.0
        if supervised == 0 and self.row_ranks is None:
            inputs = {**inputs, "labels": _made_up_labels(inputs)}
            supervised, weight = 1, 0.0
        total, said = torch.as_tensor(supervised if num_items_in_batch is None else num_items_in_batch), {}
        total = torch.where(total > 0, total, torch.ones_like(total))
        arguments = {name: value for name, value in inputs.items() if name not in BESIDE_LABELS} | {"use_cache": False}
        if self.loss_scaling == "sum":
            arguments["num_items_in_batch"] = total
        if self._skips_logits and not return_outputs:
            arguments["skip_logits"] = True
        if num_items_in_batch is not None:
            said = self.objective.arguments(inputs)
        if self.drawn is not None and num_items_in_batch is not None:
            self.drawn.begin(inputs)
        if self.row_ranks is not None:
            said["row_share"] = RowShare(inputs[ROW_CUT], self.row_ranks)
        with self.gauges.computing() if num_items_in_batch is not None else nullcontext(), token_statistics() as tally:
            outputs = model(**accepted_inputs(self.model, arguments), **said)
        if supervised and weight and self.model.training and torch.is_grad_enabled():
            self.token_sums.add(tally, inputs)
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        if self.loss_scaling == "mean":
            loss = loss * (supervised / total)
        # DDP and DeepSpeed average gradients over processes, while the divisor already counts all of them.
        loss = loss * (weight * self.accelerator.num_processes)
        if self.guarded is not None and num_items_in_batch is not None:
            self.guarded.runs(loss)
        return (loss, outputs) if return_outputs else loss

    @functools.cached_property
    def _skips_logits(self) -> bool:
        """Whether logits aren't made of held-out rows either, whose model isn't in training."""
        return takes(self.model, "skip_logits")

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward pass; the first one of a run is audited."""
        if inputs.get("skipped"):
            return torch.zeros_like(self._tr_loss)
        if not self._audited and self._audit is None:
            check_engine(self)
            self._audit = GradientAudit(self.model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._audit is not None:
            self._audit.finish()
            self._audit, self._audited = None, True
        if self.guarded is not None:
            self.guarded.ran(loss)
        return loss

    def _restore_unlogged(self) -> None:
        """Take up the logging window that the checkpoint was saved in: its losses, and the step it began at."""
        if self._unlogged is not None:
            self._tr_loss += self._unlogged["loss"]
            self._globalstep_last_logged = int(self._unlogged["since"])
            self._unlogged = None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of a forward and backward pass, by the usual estimate; the parent counts all parameters at each call."""
        return self._operations * int(inputs["num_tokens"])

    @property
    def _operations(self) -> int:
        """Of a token, forward and backward: 2 for each weight and pass, and 2 more for one that is trained."""
        if self._per_token is None:
            weights = self.model.num_parameters(exclude_embeddings=True)
            trained = self.model.num_parameters(only_trainable=True, exclude_embeddings=True)
            self._per_token = 4 * weights + 2 * trained
        return self._per_token

    @property
    def gauges(self) -> Gauges:
        """How well this process is used."""
        if self._gauges is None:
            alone = self.ran_on.get("zero_stage") != 3  # whose forward passes gather weights
            self._gauges = Gauges(self.args.device, per_token=self._operations, forward_is_alone=alone)
        return self._gauges

    # ---- optimizer ----

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm of a step, whose numbers are looked at here, before the step is taken."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.guarded is not None and self.guarded.look(model, float(norm)):
            return norm if math.isfinite(norm) else None
        # A gradient scaler leaves out steps whose norm is infinite, and tries again with a smaller scale.
        scaled = getattr(self.accelerator, "scaler", None) is not None
        self._numbers.note(self.state.global_step + 1, self._tr_loss, 0.0 if scaled else norm)
        return norm

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's; where the stage asks for weights in bfloat16, groups of its own or Muon, with these."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self._train is not None and self._train.weights_dtype == "bfloat16":
            self.optimizer = optimizer = rounding(optimizer, self._train)
        if is_new and self._train is not None and groups_of_its_own(self._train):
            self.optimizer = optimizer = regrouped(optimizer, self.model, self._train)
        if is_new:
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            self._parameter_names = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that take weight decay: matrices that aren't A_log, D, lambdas, norms or biases."""
        return [name for name, parameter in model.named_parameters() if takes_decay(name, parameter)]

    # ---- logging and checkpoints ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the counters since the last log; raise UserError when a number of a step since then was not finite."""
        if "loss" in logs:
            self._tick()
            self.refuse(self._numbers.fault())
            seconds = self.counters["seconds"] - self._logged["seconds"]
            tokens = self.counters["tokens"] - self._logged["tokens"]
            logs["tokens"] = int(self.counters["tokens"])
            logs["supervised_tokens"] = int(self.counters["supervised_tokens"])
            logs["seconds"] = round(self.counters["seconds"], 3)
            logs["tokens_per_second"] = round(tokens / seconds, 1) if seconds > 0 else 0.0
            self._logged = dict(self.counters)
            logs.update(self.token_sums.window())
            logs.update(self.gauges.read(tokens, seconds))
            if self.guarded is not None:
                self.guarded.correct(logs, self.state.global_step)
        self._metrics[("train" if self.model.training else "eval")].clear()
        Trainer.log(self, logs, start_time)

    def pause(self) -> None:
        """What comes now isn't training time, until `go_on` or `log_aside`."""
        if self._clock is not None:
            self._tick()
        if self.watchdog is not None:
            self.watchdog.rest()

    def go_on(self) -> None:
        """What comes now is training time again."""
        if self.watchdog is not None:
            self.watchdog.beat()
        if self._clock is not None:
            self._clock = time.perf_counter()

    def log_aside(self, logs: dict[str, float]) -> None:
        """A line of the log about held-out rows or suites, beside the step's own, which may be still to come."""
        self.go_on()
        asked = self.control.should_log
        Trainer.log(self, logs)
        self.control.should_log = asked

    def get_total_train_batch_size(self, args: Any) -> int:
        """Rows of an optimizer step, which the parent counts for every process."""
        return super().get_total_train_batch_size(args) // self.sequence_parallel_size

    @property
    def steps_of_an_epoch(self) -> int:
        """Optimizer steps in which all rows are trained once."""
        args: Any = self.args
        rows, batch = len(self.train_dataset), args.per_device_train_batch_size * self.data_ranks.count  # type: ignore[arg-type]
        batches = rows // batch if args.dataloader_drop_last else -(-rows // batch)
        return max(1, -(-batches // args.gradient_accumulation_steps))

    @property
    def steps_of_the_stage(self) -> int:
        """Optimizer steps of the whole stage, unless it is ended before."""
        asked = self.args.max_steps
        return asked if asked > 0 else math.ceil(self.args.num_train_epochs * self.steps_of_an_epoch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights as a stage hands them on: from an engine, its float32 masters, tied ones once."""
        weights = whole_weights(self)
        if weights is None:
            super().save_model(output_dir, _internal_call)
        else:
            self._save(output_dir, state_dict=weights)

    def check_finite(self) -> None:
        """Raise UserError on all processes when a step's numbers, the weights or the optimizer's are not finite.

        So too when the weights, finite themselves, don't give a finite loss. Asked before a checkpoint is written, when
        one is loaded, and before the weights are handed on.
        """
        self.refuse(self._numbers.fault() or weights_fault(self.model, self.optimizer) or self._loss_fault())

    def _loss_fault(self) -> str:
        """That the weights, as they are now, give no finite loss on the first row; empty when they do."""
        rows: Any = self.train_dataset
        inputs = self._prepare_inputs(self.data_collator([rows[0]]))
        with undisturbed(self.model), forward_only(self.model_wrapped), torch.no_grad():
            self.model_wrapped.train()  # the path that is trained, which may keep less in memory
            loss = self.compute_loss(self.model_wrapped, inputs)
        (faults,) = over_processes([int(not torch.isfinite(loss))])
        return f"The weights after step {self.state.global_step} give no finite loss" if faults else ""

    def alert(self, kind: str, message: str, step: int | None = None) -> None:
        """Add one to the run's alerts (`alerts.KINDS`), of `step` or now; all processes may call it, one writes."""
        if self.alerts is not None and self.args.should_save:
            self.alerts(kind, self.state.global_step if step is None else step, message)

    def refuse(self, fault: str) -> None:
        """Raise UserError with `fault`, the beginning of a sentence, unless it is empty. On all processes."""
        if not fault:
            return
        self.alert("diverging", fault)
        self.marking.finish()
        self.accelerator.wait_for_everyone()
        stage, good = self.identity.get("stage"), newest_whole(Path(str(self.args.output_dir)), self.state.global_step)
        kept = f"The newest checkpoint with finite weights is {good}." if good else "No checkpoint was saved before it."
        with alike():
            raise RestartError(
                f"{fault}: training diverged. {kept} Lower learning_rate, raise warmup_steps or lower max_grad_norm, "
                f"and start the stage again with --restart {stage}."
            )

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """The state that a resume goes on from, but for logging_steps and save_steps, which are the recipe's."""
        begun = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return begun

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """The wrapped model, with everything loaded that a resume needs: none of it may be broken."""
        if resume_from_checkpoint and self.other_engine:
            prepared = self._prepare_for_another_engine(max_steps, train_dataloader, resume_from_checkpoint)
        else:
            self._cut_up()
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint:
            self.check_finite()
        if self.guarded is not None and self.is_deepspeed_enabled:
            self.guarded.gate()
        return prepared

    def _cut_up(self) -> None:
        """Under ZeRO-3, leave each process its part of the weights."""
        if is_sharded(self.args):
            self.create_optimizer()  # by the shapes of whole parameters
            shard(self.model, self.args)

    def can_return_to(self, marker: Mapping[str, Any]) -> bool:
        """Whether `return_to` takes a checkpoint with this marker: under DeepSpeed one of another engine, or of other
        processes, where ZeRO trains all weights."""
        own = not self.is_deepspeed_enabled or marker["ran_on"] == self.ran_on
        return own or (bool(self.ran_on["zero_stage"]) and not hasattr(self.model, "peft_config"))

    def return_to(self, folder: Path) -> None:
        """Take the weights and the optimizer's state of a checkpoint back, on all processes; all else goes on."""
        optimizer: Any = self.optimizer
        rates = [group["lr"] for group in optimizer.param_groups]
        if self.is_deepspeed_enabled and (read_sealed(folder / MARKER) or {}).get("ran_on") != self.ran_on:
            take_weights(folder, self._parameter_names, self.model, optimizer)
            take_over(folder, self._parameter_names, optimizer, rates)
        elif self.is_deepspeed_enabled:
            engine: Any = self.model_wrapped
            strict = not hasattr(self.model, "peft_config")
            engine.load_checkpoint(str(folder), load_module_strict=strict, load_lr_scheduler_states=False)
            engine.global_steps = self.state.global_step
        else:
            self._load_from_checkpoint(str(folder))
            if (folder / "optimizer.pt").is_file():
                state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
                optimizer.load_state_dict(state)
            else:
                take_over(folder, self._parameter_names, optimizer, rates)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.ema is not None:
            self.ema.return_to(folder)

    def _prepare_for_another_engine(self, max_steps: int, train_dataloader: Any, checkpoint: str) -> Any:
        """The same, from a checkpoint that another engine wrote, or this one on another number of processes."""
        if self.is_deepspeed_enabled:
            self._load_from_checkpoint(checkpoint)  # into what the engine is made of
            self._cut_up()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        schedule: Any = self.lr_scheduler
        schedule.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        take_over(Path(checkpoint), self._parameter_names, self.optimizer, schedule.get_last_lr())
        if self.is_deepspeed_enabled:
            engine: Any = self.model_wrapped
            engine.global_steps = self.state.global_step  # its files are named so
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The random numbers that a process goes on with: its own, or, as one of other processes than those that saved
        the checkpoint, new ones that follow from the step."""
        if self.other_processes and checkpoint is not None:
            place = [self.args.seed, self.state.global_step, self.args.process_index]
            set_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        else:
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save everything a resume needs. Beside the next steps the folder is marked whole; only then older ones go."""
        self.pause()
        self.marking.finish()
        self.check_finite()
        if self.room is not None:
            self.room.check_save(self.state.global_step)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:
                (folder / "complete.json").unlink(missing_ok=True)
            # Past SFTTrainer's own, which writes a model card into the stage's folder.
            Trainer._save_checkpoint(self, model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.ema is not None:
            self.ema.save(folder)
        self.accelerator.wait_for_everyone()
        loss = self.accelerator.reduce(self._tr_loss.detach().clone(), reduction="mean").item()
        seen = self.token_sums.state()
        if self.args.should_save:
            unlogged = {"loss": loss, "since": self._globalstep_last_logged}
            counters = {**self.counters, "unlogged": unlogged, "token_sums": seen}
            if self.guarded is not None:
                counters["guard"] = self.guarded.guard.state()
            counters = copy.deepcopy(counters)  # of this step: they are written beside the steps that follow
            if self.room is not None:
                self.room.saved(folder)
            step, wanted = self.state.global_step, self.wanted_checkpoints(self.state.global_step)

            def mark() -> None:
                write_marker(folder, step=step, identity=self.identity, counters=counters, ran_on=self.ran_on)
                rotate(folder.parent, limit, wanted)
                if self.room is not None and (low := self.room.low()):
                    self.alert("disk-low", low, step)

            self.marking.begin(mark)
        self.go_on()  # saving isn't training time


def _start_loader_worker(seed: Any, number: int) -> None:
    leave_signals_to_the_run()
    if seed is not None:
        seed(number)


def _made_up_labels(inputs: Mapping[str, Any]) -> Tensor:
    """Labels (shape of input_ids) with one supervised token that has a predecessor in its document."""
    labels = torch.full_like(inputs["labels"], IGNORE)
    # Positions stay on the device: reading one would wait for everything before it.
    if "cu_seq_lens_q" in inputs:
        starts = inputs["cu_seq_lens_q"].long()
        row, position = torch.zeros_like(starts[:1]), starts[torch.argmax(starts.diff().ge(2).int())[None]] + 1
    else:
        row = torch.argmax(inputs["attention_mask"].sum(1))[None]
        position = torch.ones_like(row)
    return labels.index_put((row, position), inputs["input_ids"][row, position])
