"""transformers' own Trainer trains the model: labels, padded batches, gradient checkpointing, and its evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_toys import write_start


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_falls(side: str, checkpointing: bool, tmp_path: Path) -> None:
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    import sft.models  # noqa: F401  (registers phi4flash)

    folder = write_start(tmp_path / "start")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [tokenizer(f"What is {i} + {i}?{' 1' * (i % 5)} The answer is {2 * i}.") for i in range(8)]
    rows = [{**row, "labels": list(row["input_ids"])} for row in rows]
    assert len({len(row["labels"]) for row in rows}) > 1
    set_seed(0)
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=5,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=checkpointing,
    )
    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer)
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(before, rel=1e-4) and losses == sorted(losses, reverse=True), losses
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    # Padding takes no part: row by row, without any, the summed loss is the same. The Trainer divides it by the labels
    # behind a row's first column, on the left also by first tokens, which nothing predicts.
    model.eval()
    longest = max(len(row["labels"]) for row in rows)
    summed, count = 0.0, 0
    for row in rows:
        tokens = len(row["labels"]) - 1
        with torch.no_grad():
            summed += tokens * model(**{key: torch.tensor([value]) for key, value in row.items()}).loss.item()
        count += tokens + (side == "left" and tokens + 1 < longest)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(summed / count, rel=1e-4)


def test_labels_are_all_that_a_trainer_looks_for() -> None:
    """It takes a parameter with "label" in its name for a column, and evaluates without a loss where one is missing."""
    from transformers.utils.generic import find_labels

    from sft.models import Phi4FlashForCausalLM

    assert find_labels(Phi4FlashForCausalLM) == ["labels"]


def test_label_smoothing_is_honoured(tmp_path: Path) -> None:
    import sft.models
    from sft.models.load import load_checkpoint

    model = load_checkpoint(str(write_start(tmp_path / "start")), dtype="float32").eval()
    assert isinstance(model, sft.models.Phi4FlashForCausalLM)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids, label_smoothing=0.1)
        wanted = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:], label_smoothing=0.1)
        torch.testing.assert_close(output.loss, wanted)
        assert not torch.allclose(model(input_ids=ids, labels=ids).loss, wanted)
