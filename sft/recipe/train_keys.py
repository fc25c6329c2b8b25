"""The keys of a stage's `train` section: transformers' TrainingArguments and TRL's SFTConfig, and TRL's LoRA keys.

The keys most people use are declared here, with their types, so that a recipe is checked without importing TRL (5 s).
A key that isn't declared here is looked up in SFTConfig itself and passed through. Declared defaults are SFTConfig's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from sft.recipe.packaged import find_deepspeed
from sft.recipe.problems import KeyProblem, Section, nearest, raise_problems

Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]

LORA_KEYS = frozenset(
    {"use_peft", "use_rslora", "use_dora"}
    | {f"lora_{key}" for key in ("r", "alpha", "dropout", "target_modules", "target_parameters", "modules_to_save")}
)

_EVALUATE = "evaluation is set in the stage's `evaluate` section"
_RENDER = "what is trained on follows from the stage's `data` section"
_PUSH = "pushing is set in the recipe's `push` section and done by `sft push`"

# Keys of TrainingArguments and SFTConfig that the tool sets itself, or that would undo one of its promises.
REFUSED: dict[str, str] = {
    "output_dir": "set the recipe's own `output_dir`; each stage gets a folder in it",
    "overwrite_output_dir": "a run continues where it was; to start afresh set another `output_dir`",
    "logging_dir": "TensorBoard files go to <output_dir>/stages/<stage>/tensorboard",
    "resume_from_checkpoint": "the same command continues a run by itself",
    "do_train": "say `sft train`",
    "do_eval": _EVALUATE,
    "do_predict": _EVALUATE,
    "eval_strategy": _EVALUATE,
    "eval_steps": _EVALUATE,
    "eval_on_start": _EVALUATE,
    "eval_packing": _EVALUATE,
    "load_best_model_at_end": _EVALUATE,
    "metric_for_best_model": _EVALUATE,
    "push_to_hub": _PUSH,
    "hub_token": "log in with `hf auth login` or set HF_TOKEN; a token has no place in a recipe",
    "hub_private_repo": _PUSH,
    "hub_model_id": _PUSH,
    "hub_strategy": _PUSH,
    "hub_always_push": _PUSH,
    "hub_revision": _PUSH,
    "model_init_kwargs": "set the recipe's `model` section",
    "trust_remote_code": "set `model.trust_remote_code`",
    "chat_template_path": "the tokenizer's own chat template is used",
    "dataset_text_field": _RENDER,
    "dataset_kwargs": _RENDER,
    "completion_only_loss": _RENDER,
    "assistant_only_loss": "the loss is always on assistant tokens alone, end token included",
    "truncation_mode": "set `data.over_length` to drop, truncate or error",
    "padding_free": "rows are never padded in training; set `packing` to join several documents in a row",
    "remove_unused_columns": "the tool chooses the columns",
    "label_names": "the tool chooses the columns",
    "group_by_length": "use `train_sampling_strategy`",
    "eos_token": "the end token is the tokenizer's",
    "pad_token": "the padding token is the tokenizer's",
    "activation_checkpointing": "use `gradient_checkpointing`, the name that TRL reads",
    "activation_checkpointing_kwargs": "use `gradient_checkpointing_kwargs`, the name that TRL reads",
    "warmup_ratio": "this transformers has `warmup_steps` alone: a value under 1 is a fraction of all steps",
    "max_seq_length": "the name is `max_length`",
    "evaluation_strategy": _EVALUATE,
}


# Keys that stay at one value: the loss is the model's own, and every checkpoint can be continued.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0, "isn't supported: the model's own loss is trained; leave it out"),
    "loss_type": ("nll", "must be nll: the model's own loss is trained"),
    "use_liger_kernel": (False, "isn't supported: the model's own fused loss is trained; leave it out"),
    "save_only_model": (False, "must be false: a checkpoint without the optimizer can't be continued"),
}


class TrainSection(Section):
    """How a stage trains. `arguments()` gives what goes to `SFTConfig(**...)`."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    max_length: int | None = Field(
        default=1024, gt=0, description="Longest row in tokens; a pack is filled up to this."
    )
    packing: bool = Field(default=False, description="Join several documents in one row. They never see one another.")
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = Field(default="bfd", description="Best-fit decreasing.")
    per_device_train_batch_size: int = Field(default=8, gt=0, description="Rows a device takes at once.")
    gradient_accumulation_steps: int = Field(default=1, gt=0, description="Micro-batches per optimizer step.")
    num_train_epochs: float = Field(default=3.0, gt=0)
    max_steps: int = Field(default=-1, ge=-1, description="Optimizer steps; wins over num_train_epochs. -1: not set.")

    learning_rate: float = Field(default=2e-5, ge=0)
    lr_scheduler_type: Scheduler = "linear"
    lr_scheduler_kwargs: dict[str, Any] | None = Field(default=None, description="e.g. {min_lr: 1.0e-5}.")
    warmup_steps: float = Field(default=0, ge=0, description="Steps, or, under 1, a fraction of all steps.")
    optim: str = "adamw_torch_fused"
    optim_args: str | None = None
    weight_decay: float = Field(
        default=0.0, ge=0, description="Not applied to norms, biases, A_log, D and the lambdas."
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, ge=0, description="Clip gradients to this norm; 0: don't clip.")
    label_smoothing_factor: float = Field(default=0.0, ge=0, lt=1)
    neftune_noise_alpha: float | None = None
    loss_type: Literal["nll", "dft"] = "nll"
    average_tokens_across_devices: bool = Field(default=True, description="Every supervised token counts the same.")

    bf16: bool | None = Field(default=None, description="Compute in bfloat16. Default: yes.")
    fp16: bool = False
    tf32: bool | None = None
    use_cpu: bool = False
    gradient_checkpointing: bool = Field(default=True, description="Recompute activations in the backward pass.")
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    activation_offloading: bool = False
    torch_compile: bool = False
    use_liger_kernel: bool = False

    logging_steps: float = Field(default=10, gt=0)
    logging_first_step: bool = False
    report_to: str | list[str] = Field(
        default="none", description="Trackers such as wandb. TensorBoard is always written."
    )
    run_name: str | None = None
    disable_tqdm: bool | None = None
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    save_steps: float = Field(default=500, gt=0)
    save_total_limit: int | None = Field(default=None, gt=0)
    save_only_model: bool = False

    seed: int = Field(default=42, description="Default: the recipe's seed.")
    data_seed: int | None = None
    full_determinism: bool = False
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    dataset_num_proc: int | None = Field(default=None, gt=0, description="Processes that prepare the data.")
    dataloader_num_workers: int = Field(default=0, ge=0)
    dataloader_pin_memory: bool = True
    dataloader_drop_last: bool = False
    dataloader_persistent_workers: bool = False
    dataloader_prefetch_factor: int | None = Field(default=None, gt=0)

    deepspeed: str | dict[str, Any] | None = Field(
        default=None, description="zero1, zero2 or zero3, a DeepSpeed JSON file, or its content."
    )
    ddp_timeout: int = Field(default=1800, gt=0)
    ddp_find_unused_parameters: bool | None = None
    ddp_bucket_cap_mb: int | None = None

    use_peft: bool = Field(default=False, description="Train LoRA adapters instead of all weights.")
    lora_r: int = Field(default=16, gt=0)
    lora_alpha: int = Field(default=32, gt=0)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    lora_target_modules: str | list[str] | None = Field(
        default=None, description="Modules that get adapters. Default for SambaY: every projection that has a gradient."
    )
    lora_target_parameters: list[str] | None = None
    lora_modules_to_save: list[str] | None = Field(
        default=None, description="Modules trained in full beside the adapters."
    )
    use_rslora: bool = False
    use_dora: bool = False

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Tell what is wrong with any key, declared or not, in one go."""
        extra = {key: value[key] for key in value if key not in cls.model_fields} if isinstance(value, dict) else {}
        problems = _extra_problems(extra)
        try:
            section = handler(value)
        except ValidationError as error:
            raise_problems(cls.__name__, problems, error)
        problems += section._value_problems()
        if problems:
            raise_problems(cls.__name__, problems)
        return section

    def _value_problems(self) -> list[KeyProblem]:
        problems = [
            KeyProblem((key,), reason, getattr(self, key))
            for key, (allowed, reason) in UNSUPPORTED.items()
            if getattr(self, key) not in (allowed, None)
        ]
        kwargs = self.gradient_checkpointing_kwargs or {}
        if kwargs.get("use_reentrant"):
            problems.append(
                KeyProblem(
                    ("gradient_checkpointing_kwargs", "use_reentrant"),
                    "must be false: reentrant checkpointing loses the gradients of the keys and values that the "
                    "cross-decoder reads from the shared layer",
                    True,
                )
            )
        if self.packing_strategy != "bfd":
            reason = {
                "wrapped": "must be bfd: `wrapped` cuts documents anywhere and lets them see one another",
                "bfd_split": "must be bfd: `bfd_split` cuts long documents; set data.over_length instead",
            }[self.packing_strategy]
            problems.append(KeyProblem(("packing_strategy",), reason, self.packing_strategy))
        if isinstance(self.deepspeed, str) and not Path(deepspeed_file(self.deepspeed)).is_file():
            reason = f"no file {self.deepspeed!r}; zero1, zero2 and zero3 come with the tool"
            problems.append(KeyProblem(("deepspeed",), reason, self.deepspeed))
        if self.max_length is None and self.packing:
            problems.append(KeyProblem(("max_length",), "packing needs a length to fill rows up to", None))
        if not self.use_peft:
            problems += [
                KeyProblem((key,), "has no effect without `use_peft: true`", None)
                for key in sorted(self.model_fields_set & (LORA_KEYS - {"use_peft"}))
            ]
        return problems

    @model_serializer(mode="wrap")
    def _only_set_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key in self.written()}

    def written(self) -> dict[str, Any]:
        """The keys that are set."""
        return {key: value for key, value in super().written().items() if key in self.model_fields_set}

    def arguments(self) -> dict[str, Any]:
        """The keys that the recipe sets, without the LoRA ones: ready for `SFTConfig(**arguments)`."""
        arguments = {key: value for key, value in self.model_dump().items() if key not in LORA_KEYS}
        if isinstance(self.deepspeed, str):
            arguments["deepspeed"] = deepspeed_file(self.deepspeed)
        return arguments


def deepspeed_file(name: str) -> str:
    """The packaged DeepSpeed configuration called `name`, or `name` itself."""
    packaged = find_deepspeed(name)
    return str(packaged) if packaged else name


def _extra_problems(extra: dict[str, Any]) -> list[KeyProblem]:
    refused = [key for key in extra if key in REFUSED]
    problems = [KeyProblem((key,), f"is not for recipes: {REFUSED[key]}", extra[key]) for key in refused]
    others = {key: value for key, value in extra.items() if key not in REFUSED}
    return problems + (_sft_config_problems(others) if others else [])


def _sft_config_problems(extra: dict[str, Any]) -> list[KeyProblem]:
    """Check keys that this module doesn't declare against the installed TRL's SFTConfig."""
    import dataclasses

    from pydantic import TypeAdapter
    from trl import SFTConfig

    fields = {field.name: field for field in dataclasses.fields(SFTConfig)}
    known = (set(fields) | set(TrainSection.model_fields)) - set(REFUSED)
    problems = []
    for key, value in extra.items():
        if key not in fields:
            problems.append(KeyProblem((key,), f"unknown key{nearest(key, known)}", value))
            continue
        try:
            kind: Any = fields[key].type
            adapter = TypeAdapter(kind, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
            adapter.validate_python(value)
        except ValidationError:
            wanted = getattr(fields[key].type, "__name__", None) or str(fields[key].type)
            problems.append(KeyProblem((key,), f"must be {wanted}, got {value!r}", value))
    return problems
