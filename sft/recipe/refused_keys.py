"""Keys of TRL's configurations and of other trainers that a recipe's `train` section doesn't take, and why."""

from __future__ import annotations

from typing import Any

_EVALUATE = (
    "held-out rows are set in `data.validation`, `eval_strategy` and `eval_steps`; problems in the stage's `evaluate`"
)
_RENDER = "what is trained on follows from the stage's `data` section"
_PUSH = "pushing is set in the recipe's `push` section and done by `sft push`"
_ENGINE = "a stage runs on one process, on DDP (torchrun) or on DeepSpeed (`deepspeed`)"
_DDP = "the tool sets DDP up itself: every trained tensor gets a gradient in each step, which is checked"
_COMPILE = (
    "the model's kernels are compiled already, and documents are shown to be kept apart on the path that is trained"
)
_LOSS = "the model's own fused loss is trained"
_ORDER = "rows come in an order that follows from data_seed and the epoch alone; see `train_sampling_strategy`"
_LOG = "set `logging_steps`; every logged step is a line of metrics.jsonl"
_QUANTISED = "frozen weights are quantised in one way, that of QLoRA: `model.load_in_4bit`"
_START = "set the recipe's `model` section"
_NAMES = "TRL reads the older name: use `gradient_checkpointing"
_KERNELS = "a SambaY has attention kernels of its own; other models take the packed one that they have"
_ANSWERS = "the loss is always on assistant tokens alone, end token included"
_LONGEST = "the name is `max_length`"
_LORA = "LoRA is `use_peft: true` with `lora_r` and `lora_alpha`; QLoRA also takes `model.load_in_4bit: true`"
_OPTIM = "goes with optimizers that aren't offered; see `optim`"

REFUSED: dict[str, str] = {
    "output_dir": "set the recipe's own `output_dir`; each stage gets a folder in it",
    "overwrite_output_dir": "a run continues where it was; to start afresh set another `output_dir`",
    "logging_dir": "TensorBoard files go to <output_dir>/stages/<stage>/tensorboard",
    "resume_from_checkpoint": "the same command continues a run by itself",
    "restore_callback_states_from_checkpoint": "the same command continues a run by itself",
    "enable_jit_checkpoint": "SIGTERM and SIGUSR1 save a checkpoint by themselves",
    "do_train": "say `sft train`",
    **dict.fromkeys(("do_eval", "do_predict"), _EVALUATE),
    "eval_on_start": "the loss of held-out rows (`data.validation`) is always taken before training and at its end",
    "eval_packing": "held-out rows are packed as those that are trained; their loss is the same either way",
    "evaluation_strategy": "the name is `eval_strategy`",
    **dict.fromkeys(
        ("eval_delay", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"), _EVALUATE
    ),
    **dict.fromkeys(("prediction_loss_only", "include_for_metrics"), _EVALUATE),
    **dict.fromkeys(("batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"), _EVALUATE),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _EVALUATE),
    **dict.fromkeys(("push_to_hub", "hub_private_repo", "hub_model_id", "hub_strategy"), _PUSH),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _PUSH),
    "hub_token": "log in with `hf auth login` or set HF_TOKEN; a token has no place in a recipe",
    **dict.fromkeys(("model_init_kwargs", "model_name_or_path", "model_revision"), _START),
    **dict.fromkeys(("dtype", "torch_dtype"), "set `model.dtype`; what is computed in is set by `bf16`"),
    "trust_remote_code": "set `model.trust_remote_code`",
    "attn_implementation": _KERNELS,
    "load_in_4bit": "set `model.load_in_4bit`",
    **dict.fromkeys(
        ("load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"), _QUANTISED
    ),
    "lora_task_type": "it is CAUSAL_LM",
    "chat_template_path": "set model.chat_template (a known family, a file, or the template itself)",
    **dict.fromkeys(("dataset_text_field", "dataset_kwargs", "completion_only_loss"), _RENDER),
    "assistant_only_loss": _ANSWERS,
    "truncation_mode": "set `data.over_length` to drop, truncate or error",
    "padding_free": "rows are never padded in training; set `packing` to join several documents in a row",
    "pad_to_multiple_of": "rows are never padded in training",
    **dict.fromkeys(("remove_unused_columns", "label_names", "length_column_name"), "the tool chooses the columns"),
    "group_by_length": "use `train_sampling_strategy`",
    "eos_token": "the end token is the tokenizer's",
    "pad_token": "the padding token is the tokenizer's",
    "router_aux_loss_coef": "it is the model configuration's",
    "activation_checkpointing": f"{_NAMES}`",
    "activation_checkpointing_kwargs": f"{_NAMES}_kwargs`",
    "warmup_ratio": "this transformers has `warmup_steps` alone: a value under 1 is a fraction of all steps",
    **dict.fromkeys(("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "model_max_length"), _LONGEST),
    **dict.fromkeys(("adapter", "finetuning_type", "peft_config"), _LORA),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt", "mask_history"), _ANSWERS),
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "dataset_mix"), "set `data.sources` of the stage"),
    **dict.fromkeys(("val_set_size", "val_size", "test_datasets"), "set `data.validation` of the stage"),
    **dict.fromkeys(("template", "chat_template"), "set `model.chat_template`"),
    **dict.fromkeys(("base_model", "tokenizer_name_or_path"), _START),
    **dict.fromkeys(("flash_attention", "flash_attn"), _KERNELS),
    "sample_packing": "the name is `packing`",
    "neat_packing": "the name is `packing`; documents of a pack never see one another",
    "micro_batch_size": "the name is `per_device_train_batch_size`",
    "num_epochs": "the name is `num_train_epochs`",
    "lora_rank": "the name is `lora_r`",
    "lora_target": "the name is `lora_target_modules`",
    "optim_target_modules": _OPTIM,
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _COMPILE),
    "liger_kernel_config": _LOSS,
    **dict.fromkeys(("fsdp", "fsdp_config", "parallelism_config", "local_rank", "ddp_backend"), _ENGINE),
    **dict.fromkeys(("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"), _DDP),
    "ddp_timeout": "processes wait for one another up to 24 hours, as long as rank 0 alone may prepare data",
    "accelerator_config": "how rows are shared out to processes is the tool's, so that every row is trained on once",
    "dataloader_multiprocessing_context": "workers are started as the platform does it",
    "dataloader_in_order": _ORDER,
    "logging_strategy": _LOG,
    "log_on_each_node": "the first process alone tells",
    "log_level_replica": "the first process alone tells",
    "include_num_input_tokens_seen": "metrics.jsonl counts tokens and supervised tokens",
    "save_on_each_node": "nodes share the run's folder, and one copy of a checkpoint is enough",
    "trackio_static_space_id": "a page that stays as it is, is made by `trackio freeze` once the run is done",
    "debug": "a step that isn't finite stops the run by itself",
    "skip_memory_metrics": "`sft doctor` and the report tell what memory is used",
}
"""Key -> why a recipe doesn't have it."""

FIXED: dict[str, tuple[Any, str]] = {
    "packing_strategy": ("bfd", "`wrapped` cuts documents anywhere and lets them see one another"),
    "loss_type": ("nll", "another loss is `loss: {type: ...}`"),
    "label_smoothing_factor": (0, "set `loss: {label_smoothing: ...}`"),
    "use_liger_kernel": (False, _LOSS),
    "average_tokens_across_devices": (True, "every supervised token of a step counts the same, on whichever process"),
    "fp16": (False, "gradients of float16 overflow, which can't be told from a run that diverges; use bf16"),
    "use_cache": (False, "nothing is generated in training"),
    "save_only_model": (False, "a checkpoint without the optimizer can't be continued"),
    "ignore_data_skip": (False, "a continued run would see other rows than one that was never stopped"),
    "auto_find_batch_size": (False, "another batch size is another training; lower per_device_train_batch_size"),
    "shuffle_dataset": (False, _ORDER),
    "logging_nan_inf_filter": (False, "a loss that isn't a number stops the run, and isn't logged as an average"),
    "ddp_find_unused_parameters": (False, _DDP),
    "disable_tqdm": (True, "the tool tells progress in its own way"),
}
"""Key -> the one value that may be written, since it says what is done anyway, and why there is no other."""

SPLIT = "`bfd_split` cuts long documents; set data.over_length instead"


def refusal(key: str, value: Any) -> str | None:
    """Why a recipe can't set `key` to `value`; None where it says what is done anyway."""
    if key in REFUSED:
        return f"is not for recipes: {REFUSED[key]}"
    fixed, reason = FIXED[key]
    if value == fixed and isinstance(value, bool) == isinstance(fixed, bool):
        return None
    shown = str(fixed).lower() if isinstance(fixed, bool) else fixed
    return f"must be {shown}: {SPLIT if value == 'bfd_split' else reason}"
