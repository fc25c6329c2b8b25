"""What `sft plan` says of memory, beside the bytes of the tensors themselves."""

from __future__ import annotations

import dataclasses

import pytest
from counted_layouts import Layout, count, optimizer_bytes

from sft.models.load import LORA_TARGETS
from sft.models.sambay import chunked_phi4flash
from sft.run.plan.chunks import CHUNK
from sft.run.plan.engines import Engine, engine_of, held
from sft.run.plan.memory import Layout as Planned
from sft.run.plan.memory import frozen_bytes, trained_bytes
from sft.run.plan.ops import PROJECTIONS, Adapters, Types
from sft.run.plan.optimizers import state_bytes
from sft.run.plan.passes import Batch, Recompute, training_pass
from sft.run.plan.shape import FLOAT32, Shape
from sft.utils.errors import UserError

IDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
SMALL = IDS | {"num_hidden_layers": 8, "vocab_size": 5056, "hidden_size": 512, "intermediate_size": 2048}
SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 4}
NARROW = SMALL | {"hidden_size": 160, "intermediate_size": 256, "vocab_size": 400}
DEEP = SMALL | {"num_hidden_layers": 16, "hidden_size": 256, "intermediate_size": 512}
WORDY = SMALL | {"vocab_size": 65536}
LORA = {"lora": 16, "dtype": "bfloat16"}

LAYOUTS = {
    "one row": Layout(2048, config=SMALL),
    "nothing recomputed": Layout(2048, config=SMALL, checkpointing=False),
    "float32": Layout(2048, config=SMALL, bf16=False),
    "float32, nothing recomputed": Layout(2048, config=SMALL, bf16=False, checkpointing=False),
    "rows": Layout(512, rows=4, documents=4, config=SMALL),
    "packed": Layout(4096, documents=16, config=SMALL),
    "packed, prompts": Layout(4096, documents=16, kept=0.75, config=SMALL),
    "packed, long prompts, nothing recomputed": Layout(
        4096, documents=16, kept=0.25, config=SMALL, checkpointing=False
    ),
    "many short documents": Layout(4096, documents=128, config=NARROW),
    "narrow": Layout(2048, config=NARROW),
    "narrow, nothing recomputed": Layout(2048, config=NARROW, checkpointing=False),
    "deep": Layout(2048, config=DEEP),
    "large vocabulary, short": Layout(1024, config=WORDY),
    "large vocabulary, long": Layout(16384, config=WORDY),
    "second micro-batch": Layout(2048, config=SMALL, accumulates=True),
    "LoRA": Layout(2048, config=SMALL, **LORA),
    "LoRA, nothing recomputed": Layout(2048, config=SMALL, checkpointing=False, **LORA),
    "LoRA, packed, of rank 64": Layout(4096, documents=16, kept=0.5, config=SMALL, **LORA | {"lora": 64}),
    "LoRA, float32": Layout(2048, config=SMALL, lora=64, bf16=False),
    "LoRA with dropout on a CPU": Layout(1024, config=SMALL, lora=8, dropout=0.1, bf16=False, device="cpu"),
    "MLPs in chunks": Layout(20480, documents=5, config=NARROW),
    "MLPs in chunks, LoRA": Layout(20480, documents=5, config=NARROW, **LORA),
    "attention kept": Layout(4096, config=SMALL, selective=True),
    "inputs on the host": Layout(4096, config=DEEP, offload=True),
    "inputs on the host, attention kept": Layout(4096, config=DEEP, offload=True, selective=True),
    "weights in bfloat16": Layout(2048, config=SMALL, half=True),
    "weights in bfloat16, in chunks": Layout(20480, config=SMALL, half=True),
    "the first of four ranks to a row": Layout(4096, config=SMALL, shared=(4, 0)),
    "the second of four ranks to a row": Layout(4096, config=SMALL, shared=(4, 1), before=4096),
    "the last of four ranks to a row": Layout(3072, config=SMALL, shared=(4, 3), before=13312),
    "a CPU": Layout(2048, config=SMALL, bf16=False, device="cpu"),
    "a CPU, bfloat16, nothing recomputed": Layout(2048, config=SMALL, checkpointing=False, device="cpu"),
}
PUBLISHED = {
    "16K": Layout(16384),
    "LoRA, packed, prompts": Layout(16384, documents=4, kept=0.75, **LORA | {"lora": 64}),
}


# The others, of which a pass takes seconds each, are for `make test-slow`.
QUICK = ("nothing recomputed", "packed, prompts", "large vocabulary, short", "second micro-batch", "MLPs in chunks")
QUICK += ("weights in bfloat16, in chunks", "the second of four ranks to a row", "inputs on the host, attention kept")
QUICK += ("LoRA, packed, of rank 64", "a CPU")
MARKED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]


@pytest.mark.parametrize("name", MARKED)
def test_planned_bytes_are_those_of_the_tensors(name):
    _compare(LAYOUTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_planned_bytes_of_the_published_model_are_those_of_the_tensors(name):
    _compare(PUBLISHED[name])


def _compare(layout):
    shape, counted = Shape.of(layout.config, ""), count(layout)
    adapters = Adapters(layout.lora, frozenset(PROJECTIONS), layout.dropout) if layout.lora else None
    width = 2 if layout.dtype == "bfloat16" else FLOAT32
    share = int(layout.tokens * layout.kept)
    recompute = Recompute(layout.checkpointing, layout.selective, layout.offload)
    plain = Planned(Engine(), 1, 1, 1, 1, recompute, layout.bf16, adapters=adapters, frozen_width=width)
    plain = dataclasses.replace(plain, device=layout.device, weights_width=2 if layout.half else FLOAT32)
    goes_on = layout.shared is not None and layout.shared[1] + 1 < layout.shared[0]
    found = training_pass(
        shape,
        Batch(layout.tokens, share, share, layout.documents, layout.shared is not None, layout.before, goes_on),
        plain.types(),
        recompute=recompute,
        adapters=adapters,
        keeps_gradients=not layout.accumulates,
        inside=False,  # tensors without values don't tell what ops use inside
    )
    trained = trained_bytes(shape, plain)
    weights, summed = trained + frozen_bytes(shape, plain), trained * layout.accumulates
    assert weights == pytest.approx(counted.weights, rel=1e-9)
    assert found.after_forward + summed == pytest.approx(counted.after_forward, rel=0.05)
    assert found.total + summed == pytest.approx(counted.peak, rel=0.05)


@pytest.mark.parametrize(
    ("name", "planned"), [("AdamW", "adamw_torch"), ("RMSprop", "rmsprop"), ("Adagrad", "adagrad"), ("SGD", "sgd")]
)
def test_planned_optimizer_states_are_those_of_the_optimizer(name, planned):
    shape = Shape.of(NARROW, "")
    states = state_bytes(planned, None, shape, shape.parameters, adapters=False)
    assert states == pytest.approx(optimizer_bytes(NARROW, name), rel=0.001)


def test_there_are_as_many_layouts_as_were_promised():
    assert len(LAYOUTS) >= 20


def test_the_default_targets_are_those_that_are_adapted():
    assert PROJECTIONS == LORA_TARGETS


def test_chunks_are_those_of_the_model():
    assert CHUNK == chunked_phi4flash.CHUNK


def test_parameters_are_counted_and_other_models_are_refused():
    assert Shape().parameters == 3_852_562_944
    with pytest.raises(UserError, match="is a llama: sft plan knows SambaY models"):
        Shape.of({"model_type": "llama"}, "my-model")


def test_kept_states_grow_with_documents_and_nothing_else_does():
    """A naive plan by tokens alone would say the same of one document and of many."""
    shape, types = Shape.of(NARROW, ""), Types()
    one, many = (
        training_pass(shape, Batch(4096, 4096, 4096, documents), types, recompute=Recompute(layers=False))
        for documents in (1, 512)
    )
    state = shape.inner * shape.mamba_d_state * FLOAT32
    mambas = shape.memory_layer // 2 + 1
    assert many.after_forward - one.after_forward == 511 * mambas * state


@pytest.mark.parametrize("world", [2, 8])
def test_engines_part_what_their_paper_says(world):
    """ZeRO, arXiv 1910.02054, table 1, for float32 masters without a copy in 16 bits: 16 bytes a parameter in all."""
    values, shape = 10**9, Shape()
    options = {"frozen": 0, "trained": 4 * values, "states": 8 * values, "accumulates": True, "copies": 0.0}
    plain = held(Engine(1), **options)
    assert plain.weights + plain.gradients + plain.optimizer == 16 * values
    one, two, three = (held(Engine(world, stage), **options) for stage in (1, 2, 3))
    part = 4 * values // world
    assert (one.weights, one.gradients, one.optimizer) == (4 * values, 4 * values, 3 * part)
    assert (two.weights, two.gradients, two.optimizer) == (4 * values, 2 * part, 3 * part)
    assert (three.weights, three.gradients, three.optimizer) == (part, part, 2 * part)
    offloaded = held(dataclasses.replace(Engine(world, 2), offload_optimizer=True), **options)
    assert (offloaded.optimizer, offloaded.host) == (0, 5 * part)
    assert engine_of({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, 2, shape, "").bucket == 2560**2
