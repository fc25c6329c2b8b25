"""The keys of a stage's `train` section: an allow-list of keys that are honoured, each with our default.

Names are those of transformers' TrainingArguments, TRL's SFTConfig and, for LoRA, its ModelConfig. All of them are
handed over, defaults too, so that what is trained doesn't follow from a library's version. What isn't here is refused
with its reason (sft.recipe.refused_keys).
"""

from __future__ import annotations

import json
import os
from typing import Any, Literal, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from sft.recipe.guard_keys import GuardSection
from sft.recipe.loss_keys import DistillSection, LossSection
from sft.recipe.optimizer_keys import OWN_OPTIMIZERS, ParamGroup, optimizer_problems
from sft.recipe.outcome_keys import EmaSection
from sft.recipe.packaged import find_deepspeed
from sft.recipe.problems import KeyProblem, Section, raise_problems
from sft.recipe.refused_keys import FIXED, REFUSED, refusal
from sft.recipe.values import Seed

Cosine = Literal["cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr"]
Constant = Literal["constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay"]
Scheduler = Literal["linear", "polynomial", Cosine, Constant]
Torch = Literal["adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"]
EightBit = Literal["adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit"]
Optimizer = Literal[Torch, "muon", EightBit, "paged_adamw_32bit", "lion_32bit", "paged_lion_32bit"]
LORA_KEYS = frozenset(
    {"use_peft", "use_rslora", "use_dora"}
    | {f"lora_{key}" for key in ("r", "alpha", "dropout", "target_modules", "target_parameters", "modules_to_save")}
)
EVALUATION_KEYS = frozenset({"eval_strategy", "eval_steps", "per_device_eval_batch_size"})
"""When held-out rows (`data.validation`) are looked at."""

OWN_KEYS = frozenset(
    {"loss", "distill", "adamw_learning_rate", "param_groups", "ema", "sequence_parallel_size", "weights_dtype"}
    | {"optim_state_dtype", "guard", "keep_optimizer", "stall_timeout"}
)
"""What no library has a key for: the trainer reads these itself."""

PREPARED_KEYS = EVALUATION_KEYS | OWN_KEYS | {"max_length", "packing", "dataset_num_proc"}
"""What this package does itself when data is prepared, a loss is taken and rows are held out; TRL, which would do some
of it too, isn't told."""

NEUTRAL = EVALUATION_KEYS | frozenset(
    {"logging_steps", "logging_first_step", "log_level", "report_to", "run_name", "save_strategy", "save_steps"}
    | {"project", "trackio_space_id", "trackio_bucket_id"}
    | {
        "save_total_limit",
        "keep_optimizer",
        "stall_timeout",
        "dataset_num_proc",
        "dataloader_num_workers",
        "dataloader_pin_memory",
    }
    | {"dataloader_persistent_workers", "dataloader_prefetch_factor", "torch_empty_cache_steps"}
    | {"gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_offloading"}
)
"""Keys that change nothing of what is trained: a stage that is done or under way may be run again with others."""


class TrainSection(Section):
    """How a stage trains."""

    max_length: int | None = Field(
        default=1024, gt=0, description="Longest row in tokens; a pack is filled up to this."
    )
    packing: bool = Field(default=False, description="Join several documents in one row. They never see one another.")
    dataset_num_proc: int | None = Field(default=None, gt=0, le=1024, description="Processes that prepare the data.")

    per_device_train_batch_size: int = Field(default=8, gt=0, description="Rows that a process takes at once.")
    gradient_accumulation_steps: int = Field(default=1, gt=0, description="Micro-batches of an optimizer step.")
    num_train_epochs: float = Field(default=3.0, gt=0, description="How often all rows are trained on.")
    max_steps: int = Field(default=-1, ge=-1, description="Optimizer steps; wins over num_train_epochs. -1: not set.")
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = Field(
        default="random", description="Order of the rows. group_by_length: similar lengths come together."
    )
    dataloader_drop_last: bool = Field(default=False, description="Leave out rows that don't fill the last step.")

    loss: LossSection = Field(default_factory=LossSection, description="What is minimised. Default: cross entropy.")
    distill: DistillSection | None = Field(
        default=None, description="Learn from a teacher's best tokens too, which the rows have to say."
    )

    learning_rate: float = Field(default=2e-5, ge=0, description="Highest learning rate.")
    lr_scheduler_type: Scheduler = Field(default="linear", description="How the learning rate changes.")
    lr_scheduler_kwargs: dict[str, Any] | None = Field(
        default=None, description="Of that schedule, e.g. {min_lr: 1.0e-5}."
    )
    warmup_steps: float = Field(default=0.0, ge=0, description="Steps, or, under 1, a fraction of all steps.")
    optim: Optimizer = Field(
        default="adamw_torch_fused",
        description="Optimizer. muon: torch's for the matrices of hidden layers, fused AdamW for the rest. *_8bit, "
        "paged_* and lion_*: bitsandbytes', on a GPU.",
    )
    optim_args: str | None = Field(
        default=None,
        description="Of muon (momentum, nesterov, ns_steps, adjust_lr_fn), sgd, adagrad or rmsprop, e.g. "
        "momentum=0.9,alpha=0.9.",
    )
    adamw_learning_rate: float | None = Field(
        default=None, ge=0, description="With muon: of what AdamW trains. Default: learning_rate."
    )
    param_groups: list[ParamGroup] | None = Field(
        default=None,
        min_length=1,
        description="Parameters with a learning rate or weight decay of their own, by pattern; the first that matches "
        "counts, e.g. [{match: 'lambda_|A_log', learning_rate: 1.0e-4}].",
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="Not applied to norms, biases, A_log, D and the lambdas."
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the first moment, of Adam and Lion.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the second moment, of Adam and Lion.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="Added to Adam's denominator.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Clip gradients to this norm; 0: don't clip.")
    neftune_noise_alpha: float | None = Field(
        default=None,
        gt=0,
        description="NEFTune: noise on the embeddings, alpha / sqrt(L d) for a document of L tokens.",
    )

    ema: EmaSection | None = Field(
        default=None, description="Keep an average of the weights, which the stage hands on in their place."
    )

    weights_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="What trained weights are held in. bfloat16: half the memory, of gradients too; AdamW's steps are "
        "taken in float32 and rounded stochastically. A_log, D, lambdas, norms and biases stay in float32.",
    )
    optim_state_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="With weights_dtype bfloat16: what AdamW's moments are held in."
    )
    guard: GuardSection | None = Field(
        default_factory=GuardSection,
        description="Leave out steps whose loss or gradient norm isn't finite, or spikes. null: the first that isn't "
        "finite stops the stage, and nothing else is watched.",
    )

    bf16: bool | None = Field(
        default=None, description="Compute in bfloat16. Default: where it is fast (GPU, AMX, AVX512-BF16)."
    )
    tf32: bool | None = Field(default=None, description="Compute float32 matrix products in TF32. Default: as torch.")
    use_cpu: bool = Field(default=False, description="Leave a GPU alone.")
    gradient_checkpointing: bool | None = Field(
        default=None, description="Recompute activations in the backward pass. Default: on a GPU."
    )
    gradient_checkpointing_kwargs: dict[str, Any] | None = Field(
        default=None,
        description="{selective: true}: keep the results of attention over whole documents, which are dear to compute "
        "again. (use_reentrant is always false.)",
    )
    activation_offloading: bool = Field(
        default=False,
        description="Keep what waits for the backward pass in the host's memory: of layers that are recomputed their "
        "inputs, each fetched while the layer above is at work. Needs a GPU.",
    )
    torch_empty_cache_steps: int | None = Field(
        default=None, gt=0, description="Give unused GPU memory back every so many steps."
    )
    deepspeed: str | dict[str, Any] | None = Field(
        default=None, description="zero1, zero2 or zero3, a DeepSpeed JSON file, or its content."
    )

    sequence_parallel_size: int = Field(
        default=1,
        gt=0,
        le=1024,
        description="Processes that share each packed row, each holding a part of its tokens. Only for SambaY models.",
    )

    logging_steps: float = Field(default=1.0, gt=0, description="Steps between lines of metrics, or a fraction of all.")
    logging_first_step: bool = Field(default=False, description="Log the first step too.")
    log_level: Literal["debug", "info", "warning", "error", "critical"] = Field(
        default="warning", description="What transformers tells on standard error."
    )
    report_to: str | list[str] = Field(
        default="none",
        description="Trackers, e.g. trackio, wandb, mlflow; all: those installed. TensorBoard is always written.",
    )
    run_name: str | None = Field(
        default=None, description="What trackers call the run; stages add their names. Default: the recipe's name."
    )
    project: str = Field(
        default="huggingface",
        min_length=1,
        description="What trackers file the run under, unless WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or "
        "TRACKIO_PROJECT says it.",
    )
    trackio_space_id: str | None = Field(
        default=None,
        description="The Space (USER/NAME) that trackio writes to, which the model card links. Made private unless "
        "push.private is false. Default: on this machine alone.",
    )
    trackio_bucket_id: str | None = Field(default=None, description="The Hub bucket of that Space's data.")
    eval_strategy: Literal["no", "steps", "epoch"] = Field(
        default="no", description="When the loss of held-out rows is taken between the first step and the last."
    )
    eval_steps: float | None = Field(
        default=None, gt=0, description="Steps in between, or a fraction of all. Default: logging_steps."
    )
    per_device_eval_batch_size: int = Field(default=8, gt=0, description="Held-out rows that a process takes at once.")
    save_strategy: Literal["no", "steps", "epoch"] = Field(default="steps", description="When checkpoints are saved.")
    save_steps: float = Field(default=100.0, gt=0, description="Steps between checkpoints, or a fraction of all.")
    save_total_limit: int | None = Field(default=2, gt=0, description="Checkpoints that are kept; null: all.")

    keep_optimizer: bool = Field(
        default=False,
        description="Keep the optimizer's state in the checkpoints of a stage that is done; else their weights alone.",
    )
    stall_timeout: float | None = Field(
        default=1800.0,
        gt=0,
        description="Seconds without a micro-batch after which the stage is ended (exit code 75), with each process's "
        "stack in its folder. null: never.",
    )

    seed: Seed = Field(default=42, description="Of dropout, noise and adapters. Default: the recipe's seed.")
    data_seed: Seed | None = Field(default=None, description="Of the order of rows. Default: seed.")
    full_determinism: bool = Field(default=False, description="Refuse operations that aren't deterministic. Slower.")
    dataloader_num_workers: int = Field(default=0, ge=0, le=1024, description="Processes that load rows.")
    dataloader_pin_memory: bool | None = Field(default=None, description="Pin rows in memory. Default: with a GPU.")
    dataloader_persistent_workers: bool = Field(default=False, description="Keep the workers between epochs.")
    dataloader_prefetch_factor: int | None = Field(default=None, gt=0, description="Batches each worker loads ahead.")

    use_peft: bool = Field(default=False, description="Train LoRA adapters instead of all weights.")
    lora_r: int = Field(default=16, gt=0, description="Rank of an adapter's two matrices.")
    lora_alpha: int = Field(default=32, gt=0, description="Scale: alpha / r, or alpha / sqrt(r) with use_rslora.")
    lora_dropout: float = Field(default=0.05, ge=0, lt=1, description="Dropout before the adapters.")
    lora_target_modules: str | list[str] | None = Field(
        default=None, description="Modules that get adapters. Default for SambaY: every projection that has a gradient."
    )
    lora_target_parameters: list[str] | None = Field(
        default=None, description="Parameters that get adapters and are no module's weight, such as experts'."
    )
    lora_modules_to_save: list[str] | None = Field(
        default=None, description="Modules trained in full beside the adapters."
    )
    use_rslora: bool = Field(default=False, description="Rank-stabilised scale.")
    use_dora: bool = Field(default=False, description="Adapt magnitude and direction apart (DoRA).")

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Tell what is wrong with any key, offered or not, in one go."""
        problems: list[KeyProblem] = []
        if isinstance(value, dict):
            others = [key for key in value if key in REFUSED or key in FIXED]
            reasons = {key: refusal(key, value[key]) for key in others}
            problems = [KeyProblem((key,), reason, value[key]) for key, reason in reasons.items() if reason]
            value = {key: item for key, item in value.items() if key not in reasons}
        try:
            section = handler(value)
        except ValidationError as error:
            raise_problems(cls.__name__, problems, error)
        problems += [*section._value_problems(), *optimizer_problems(section), *section._lora_problems()]
        if problems:
            raise_problems(cls.__name__, problems)
        return section

    def _value_problems(self) -> list[KeyProblem]:
        problems = []

        def tell(key: str, reason: str, *inside: str) -> None:
            problems.append(KeyProblem((key, *inside), reason, getattr(self, key)))

        for inside, wanted in (self.gradient_checkpointing_kwargs or {}).items():
            if inside == "selective":
                if not isinstance(wanted, bool):
                    tell("gradient_checkpointing_kwargs", f"must be true or false, not {wanted!r}", inside)
                elif wanted and self.gradient_checkpointing is False:
                    tell("gradient_checkpointing_kwargs", "has no effect without gradient_checkpointing", inside)
            elif inside != "use_reentrant":
                tell("gradient_checkpointing_kwargs", "isn't offered: what is recomputed must be what was used", inside)
            elif wanted is not False:
                reason = (
                    "must be false: reentrant checkpointing loses the gradients of the keys and values that the "
                    "cross-decoder reads from the shared layer"
                )
                tell("gradient_checkpointing_kwargs", reason, inside)
        if self.max_steps == 0:
            tell("max_steps", "0 trains nothing; leave it out to train num_train_epochs")
        for key in ("logging_steps", "save_steps", "warmup_steps", "eval_steps"):
            steps = getattr(self, key)
            if steps is not None and steps > 1 and steps % 1:
                tell(key, "is a whole number of steps, or, under 1, a fraction of all of them")
        if self.eval_steps is not None and self.eval_strategy != "steps":
            tell("eval_steps", "has no effect without `eval_strategy: steps`")
        if self.sequence_parallel_size > 1 and self.neftune_noise_alpha is not None:
            tell(
                "neftune_noise_alpha",
                "follows from whole documents, which no process has: leave it or sequence_parallel_size out",
            )
        if self.max_length is None and self.packing:
            tell("max_length", "packing needs a length to fill rows up to")
        if self.trackio_space_id is not None and self.trackio_space_id.count("/") != 1:
            tell("trackio_space_id", f"is no Space, got {self.trackio_space_id!r}: my-name/my-metrics")
        if self.trackio_bucket_id is not None and self.trackio_space_id is None:
            tell("trackio_bucket_id", "has no effect without trackio_space_id")
        for key in ("dataloader_persistent_workers", "dataloader_prefetch_factor"):
            if getattr(self, key) and not self.dataloader_num_workers:
                tell(key, "has no effect without dataloader_num_workers")
        if isinstance(self.deepspeed, str) and not os.path.isfile(deepspeed_file(self.deepspeed)):
            tell("deepspeed", f"no file {self.deepspeed!r}; zero1, zero2 and zero3 come with the tool")
        return problems

    def _lora_problems(self) -> list[KeyProblem]:
        if not self.use_peft:
            return [
                KeyProblem((key,), "has no effect without `use_peft: true`", None)
                for key in sorted(self.model_fields_set & (LORA_KEYS - {"use_peft"}))
            ]
        empty = [key for key in sorted(LORA_KEYS) if getattr(self, key) in ([], "")]
        problems = [KeyProblem((key,), "names nothing; leave it out", getattr(self, key)) for key in empty]
        if self.lora_target_parameters and self.lora_dropout:
            reason = "must be 0 with lora_target_parameters: what goes into a parameter can't be dropped out"
            problems.append(KeyProblem(("lora_dropout",), reason, self.lora_dropout))
        if self.lora_target_parameters and self.use_dora:
            problems.append(KeyProblem(("use_dora",), "can't be used with lora_target_parameters", True))
        return problems

    @model_serializer(mode="wrap")
    def _what_counts(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if self.use_peft or key not in LORA_KEYS}

    def written(self) -> dict[str, Any]:
        """All keys, LoRA's where adapters are trained."""
        return {key: value for key, value in super().written().items() if self.use_peft or key not in LORA_KEYS}

    def complete(self, *, cuda: bool, bf16: bool) -> dict[str, Any]:
        """Every key's value, with the defaults that depend on the machine.

        Args:
            cuda: whether there is a GPU to train on.
            bf16: whether the stage computes in bfloat16, where it doesn't say so itself (sft.train.precision).
        """
        gpu = cuda and not self.use_cpu
        machine = {"bf16": bf16, "gradient_checkpointing": gpu, "dataloader_pin_memory": gpu, "data_seed": self.seed}
        values = self.model_dump()
        values |= {key: value for key, value in machine.items() if values[key] is None}
        return {**values, "use_cpu": not gpu}

    def effective(self) -> dict[str, Any]:
        """What the trained weights follow from: every key's value but the neutral ones', as JSON.

        What depends on the machine stays null: a stage that a GPU has trained is done on a CPU too. `complete` tells
        what it was.
        """
        values = {key: value for key, value in self.model_dump().items() if key not in NEUTRAL}
        if self.guard == GuardSection():
            del values["guard"]  # as stages were trained that know of none, as far as they got
        data_seed = self.seed if self.data_seed is None else self.data_seed
        return {**values, "data_seed": data_seed, "deepspeed": self.deepspeed_content()}

    @property
    def selective(self) -> bool:
        """Whether activation checkpointing keeps what is dear to compute again."""
        return bool((self.gradient_checkpointing_kwargs or {}).get("selective"))

    def arguments(self, *, cuda: bool, bf16: bool) -> dict[str, Any]:
        """Every key that `SFTConfig(**arguments)` takes; arguments as in `complete`."""
        values = self.complete(cuda=cuda, bf16=bf16)
        if isinstance(self.deepspeed, str):
            values["deepspeed"] = deepspeed_file(self.deepspeed)
        if self.optim in OWN_OPTIMIZERS:
            values |= OWN_OPTIMIZERS[self.optim]
        return {key: value for key, value in values.items() if key not in LORA_KEYS | PREPARED_KEYS}

    def four_bit_problem(self, stage: str) -> str | None:
        """Why this stage can't train on weights in 4 bits; None where it can."""
        if not self.use_peft:
            return f"stage {stage} trains all weights, which 4 bits can't hold: set its train.use_peft"
        if self.lora_target_parameters:
            return f"stage {stage} adapts lora_target_parameters, which are never in 4 bits: leave one of them out"
        if self.use_cpu:
            return f"stage {stage} has use_cpu, and weights in 4 bits need a GPU"
        engine = self.deepspeed_content()
        zero = (engine.get("zero_optimization") or {}).get("stage") if isinstance(engine, dict) else None
        return f"stage {stage} has ZeRO-3, which can't part weights in 4 bits: use zero2" if zero == 3 else None

    def evaluation_keys(self) -> dict[str, Any]:
        """What is said of held-out rows beyond the defaults."""
        defaults = {key: type(self).model_fields[key].default for key in sorted(EVALUATION_KEYS)}
        return {key: getattr(self, key) for key in defaults if getattr(self, key) != defaults[key]}

    def deepspeed_content(self) -> Any:
        """DeepSpeed's settings themselves: a file's name says nothing of what was trained."""
        if not isinstance(self.deepspeed, str):
            return self.deepspeed
        try:
            with open(deepspeed_file(self.deepspeed), encoding="utf-8") as handle:
                return json.load(handle)
        except (OSError, ValueError):
            # Told with its reason where the engine is set up.
            return self.deepspeed


def deepspeed_file(name: str) -> str:
    """The packaged DeepSpeed configuration called `name`, or `name` itself."""
    packaged = find_deepspeed(name)
    return str(packaged) if packaged else name
