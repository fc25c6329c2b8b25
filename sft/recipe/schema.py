"""What a recipe may say. One YAML file is one run: a model, stages of SFT, what to push and what to report.

Keys under `train` are those of transformers' TrainingArguments and TRL's SFTConfig, unchanged; LoRA keys are TRL's too.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import Field, PrivateAttr, model_validator

from sft.recipe.chat_templates import template_asked_for
from sft.recipe.outcome_keys import AverageSection, StopSection
from sft.recipe.problems import KeyProblem, Section, raise_problems
from sft.recipe.steps import StepEntry
from sft.recipe.train_keys import TrainSection
from sft.recipe.values import Name, PathText, Seed, SourceName
from sft.recipe.yaml_marks import Document, Path, show_path
from sft.utils.errors import UsageError

# `sft` itself uses these words where a stage's or a suite's name could stand.
RESERVED_STAGE_NAMES = ("all", "start")
RESERVED_SUITE_NAMES = ("all", "manifest.json")
PlainColumn = Literal["messages", "prompt", "input", "completion", "id", "system"]
TrainColumn = Literal[PlainColumn, "answer", "domain", "reasoning", "history", "tools", "chat_template_kwargs"]
TRAIN_COLUMNS: tuple[str, ...] = get_args(TrainColumn)


class ModelSection(Section):
    """Which model the first stage starts from."""

    model_name_or_path: PathText | None = Field(
        default=None, description="Checkpoint folder or Hub id; none: from scratch."
    )
    model_revision: str | None = Field(default=None, description="Branch, tag or commit of a Hub checkpoint.")
    config: dict[str, Any] | None = Field(default=None, description="Configuration of a model built from scratch.")
    tokenizer: PathText | None = Field(
        default=None,
        description="Tokenizer folder or Hub id (default: the checkpoint's own); `tiny` is the built-in one.",
    )
    chat_template: str | None = Field(
        default=None,
        description="Chat template: a known family (chatml, llama3, qwen3, phi4-mini, ...), a file, or its text "
        "(default: the tokenizer's own). It is handed on with the tokenizer.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16",
        description="What exported weights are stored in, and weights that aren't trained are held in (LoRA; "
        "`evaluate.bf16` says what answers are given in). Trained ones are held in float32; `train.bf16` says what is "
        "computed in.",
    )
    load_in_4bit: bool = Field(
        default=False,
        description="QLoRA: hold the frozen weights in 4 bits (NF4, by bitsandbytes) while adapters are trained. "
        "Needs a CUDA GPU. What is evaluated and exported is the adapter on the weights as they are.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run the checkpoint's own code. Never needed for SambaY."
    )

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        self.model_name_or_path, self.tokenizer = _at_home(self.model_name_or_path), _at_home(self.tokenizer)
        if self.chat_template is not None:
            self.chat_template, wrong = template_asked_for(self.chat_template)
            if wrong:
                raise_problems("model", [KeyProblem(("chat_template",), wrong, self.chat_template)])
        if (self.model_name_or_path is None) == (self.config is None):
            reason = "needs exactly one of model_name_or_path (a checkpoint) and config (a model built from scratch)"
            raise_problems("model", [KeyProblem((), reason, None)])
        if self.config is not None and self.tokenizer is None:
            reason = "a model built from scratch needs a tokenizer: a folder, a Hub id, or `tiny`"
            raise_problems("model", [KeyProblem(("tokenizer",), reason, None)])
        if self.config is not None and self.load_in_4bit:
            reason = "is for a checkpoint: adapters on random weights teach nothing"
            raise_problems("model", [KeyProblem(("load_in_4bit",), reason, True)])
        return self


class GenerateSource(Section):
    """Problems from the built-in procedural generator."""

    family: Literal["arithmetic", "equations", "words", "all"] = Field(default="all", description="Kind of problem.")
    rows: int = Field(gt=0, description="How many rows.")
    min_steps: int = Field(default=3, ge=3, description="Fewest reasoning steps of a problem.")
    max_steps: int = Field(default=6, ge=3, description="Most reasoning steps of a problem.")
    split: Literal["train", "test"] = Field(default="train", description="Train and test problems are disjoint.")
    seed: Seed = Field(default=0, description="Seed of the generator.")
    scaling: float | None = Field(
        default=None,
        ge=0,
        le=0.9,
        description="Chance of a step to multiply or divide, where its value allows it (default: 0.32). "
        "For problems of at most 8 steps; longer ones only add and subtract.",
    )

    @model_validator(mode="after")
    def _check(self) -> GenerateSource:
        if self.min_steps > self.max_steps:
            reason = f"is {self.max_steps}, less than min_steps, which is {self.min_steps}"
            raise_problems("generate", [KeyProblem(("max_steps",), reason, self.max_steps)])
        return self


class Source(Section):
    """One data set: a Hub id or local files (`path`), or generated problems (`generate`)."""

    path: PathText | None = Field(
        default=None, description="Hub id, or a local file, folder or glob of .jsonl, .parquet, .json or .csv files."
    )
    config: str | None = Field(default=None, description="Configuration (subset) of a Hub data set.")
    split: str = Field(default="train", description="Split of a Hub data set.")
    data_files: str | list[str] | None = Field(
        default=None, description="Files of a Hub data set, by name or glob, where it has no configurations for them."
    )
    revision: str | None = Field(default=None, description="Revision of a Hub data set.")
    columns: dict[PlainColumn, str] | None = Field(
        default=None,
        description="Which column is what, e.g. {prompt: question, completion: answer}. Default: found by name.",
    )
    max_rows: int | None = Field(default=None, gt=0, description="Take only the first rows.")
    license: str | None = Field(default=None, description="Licence of the data, for the model card.")
    generate: GenerateSource | None = None

    @model_validator(mode="after")
    def _check(self) -> Source:
        if (self.path is None) == (self.generate is None):
            reason = "needs exactly one of path (a Hub id or local files) and generate (generated problems)"
            raise_problems("source", [KeyProblem((), reason, None)])
        return self


class Templates(Section):
    """How the texts of a row become messages."""

    prompt_template: str | None = Field(
        default=None,
        description="How a prompt column becomes the user's message, e.g. 'Reason step by step. {prompt}'.",
    )
    completion_template: str | None = Field(
        default=None, description="The same for a completion column, with {completion}."
    )
    system_prompt: str | None = Field(
        default=None, description="System message put in front of conversations without one."
    )

    def turns(self, problem: str, completion: str) -> list[dict[str, Any]]:
        """The messages of a problem and its answer, without a system message."""
        # Not str.format: prompts and templates are full of LaTeX braces.
        prompt, answer = self.prompt_template, self.completion_template
        user = prompt.replace("{prompt}", problem) if prompt else problem
        assistant = answer.replace("{completion}", completion) if answer else completion
        return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]

    def conversation(self, problem: str, completion: str) -> list[dict[str, Any]]:
        """The same, with the section's system message where it has one."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, *self.turns(problem, completion)]


class DataSource(Source, Templates):
    """A source of training rows: a data set, generated problems, or another data recipe; and steps of its own.

    Its templates default to those of the section that it stands in.
    """

    name: SourceName | None = Field(
        default=None,
        description="What steps such as mix call it. Default: its recipe, Hub id or file name.",
    )
    recipe: str | None = Field(
        default=None, description="A data recipe (packaged name or file): its sources and steps are this source."
    )
    sources: list[DataSource] | None = Field(default=None, min_length=1, description="Filled in from `recipe`.")
    columns: dict[TrainColumn, str | None] | None = Field(  # type: ignore[assignment]
        default=None,
        description="Which column is what, e.g. {prompt: problem, reasoning: thoughts, completion: solution, answer: "
        "result}. Default: found by name, reasoning not (of Alpaca's "
        "rows `input` follows the instruction on a line of its own, and `history` holds the turns before it); null "
        "leaves input, history, system, tools or chat_template_kwargs out.",
    )
    rows: Literal["conversations", "problems"] = Field(
        default="conversations",
        description="`problems`: rows have no answer to learn yet; a step (explode_rollouts, generate) gives them one.",
    )
    carry: list[str] = Field(default_factory=list, description="Other columns that steps use, carried along.")
    steps: list[StepEntry] = Field(default_factory=list, description="Steps for this source's rows alone.")

    @model_validator(mode="after")
    def _check(self) -> DataSource:
        kinds = [self.path is not None, self.generate is not None, self.recipe is not None or self.sources is not None]
        if sum(kinds) != 1:
            reason = "needs exactly one of path (a Hub id or local files), recipe and generate (generated problems)"
            raise_problems("source", [KeyProblem((), reason, None)])
        return self


class ValidationSection(Section):
    """Rows that are held out of training, so that their loss tells what training does to rows it doesn't see."""

    size: float | None = Field(
        default=None, gt=0, description="How many rows to hold out: under 1 a share of all that can be trained on."
    )
    sources: list[DataSource] | None = Field(
        default=None, min_length=1, description="Rows of their own instead; what says the same isn't trained either."
    )

    @model_validator(mode="after")
    def _check(self) -> ValidationSection:
        if (self.size is None) == (self.sources is None):
            reason = "needs exactly one of size (rows to hold out) and sources (rows of their own)"
            raise_problems("validation", [KeyProblem((), reason, None)])
        if self.size is not None and self.size > 1 and self.size % 1:
            reason = "is a whole number of rows, or, under 1, a share of them"
            raise_problems("validation", [KeyProblem(("size",), reason, self.size)])
        return self


class DataSection(Templates):
    """What a stage learns from."""

    recipe: str | None = Field(
        default=None,
        description="A data recipe (packaged name or file) whose keys fill in what this section doesn't say.",
    )
    sources: list[DataSource] = Field(min_length=1)
    steps: list[StepEntry] = Field(
        default_factory=list, description="What is done with the rows of all sources, in this order."
    )
    validation: ValidationSection | None = Field(
        default=None,
        description="Rows that are never trained; their loss is taken before training, after it, and in between as "
        "train.eval_strategy says.",
    )
    seed: Seed = Field(default=0, description="What steps that choose rows choose by.")
    over_length: Literal["drop", "truncate", "error"] = Field(
        default="drop", description="What becomes of rows longer than train.max_length."
    )
    mask_history: bool = Field(
        default=False, description="Of a conversation train the last answer alone; the earlier ones are context."
    )
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1, description="More bad rows than this stop the run.")


class ChoicesSection(Section):
    """Wrong answers to choose among: problem and choices become one text, and the gold answer a letter."""

    wrong: list[str] = Field(min_length=1, max_length=9, description="Columns of the wrong answers, in their order.")
    seed: Seed = Field(
        default=0, description="Where among them the right answer stands follows from this and the problem's text."
    )


class SuiteSection(Section):
    """Held-out problems to answer by generation, and how."""

    suite: str | None = Field(
        default=None,
        description="A suite (a packaged name such as math500, or a file) whose keys fill in what this one doesn't "
        "say. A suite's name alone stands for {suite: NAME}.",
    )
    name: Name = Field(description="What the suite is called: a folder of results. Default: its file's name.")
    source: Source
    columns: dict[Literal["problem", "answer", "group", "steps", "id"], str] | None = Field(
        default=None,
        description="Which column is what. Default: found by name; a gold answer may end in '#### N' or be boxed.",
    )
    choices: ChoicesSection | None = Field(default=None, description="Multiple choice: the other columns of answers.")
    prompt_template: str | None = Field(default=None, description="Default: that of the stage's data.")
    system_prompt: str | None = Field(
        default=None, description="Default: that of the stage's data; an empty text: none."
    )
    max_problems: int | None = Field(default=None, gt=0, description="Ask only the first problems.")
    max_length: int | None = Field(
        default=None, gt=0, description="Most tokens of a prompt and its answer together, as an engine's context has."
    )
    max_new_tokens: int = Field(
        default=512, gt=0, description="Most tokens of an answer; where max_length alone is set, what that leaves."
    )
    temperature: float = Field(default=0.0, ge=0, description="0: greedy.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Sample from the likeliest tokens of this probability in all."
    )
    samples_per_problem: int = Field(default=1, gt=0, description="Answers to each problem.")
    batch_size: int = Field(default=64, gt=0, description="Answers that each process decodes at once.")
    seed: Seed = Field(default=0, description="Seed of sampling.")

    @model_validator(mode="after")
    def _check(self) -> SuiteSection:
        if self.max_length is not None and "max_new_tokens" not in self.model_fields_set:
            self.max_new_tokens = self.max_length
        return self


EVERY = r"([1-9](?:_?[0-9])*) (step|token)s?"
"""`every: 200 steps`, in a word."""


class EverySection(Section):
    """When a stage answers suites while it trains, and which. `200 steps` stands for {steps: 200}."""

    steps: int | None = Field(default=None, gt=0, description="After each so many steps.")
    tokens: int | None = Field(
        default=None, gt=0, description="After each so many tokens (all of a row's), at the step that reaches them."
    )
    suites: list[Name] | None = Field(
        default=None, min_length=1, description="The names of those of the stage's suites to ask. Default: all."
    )
    max_problems: int | None = Field(default=None, gt=0, description="Ask only the first problems of each.")

    @model_validator(mode="before")
    @classmethod
    def _in_a_word(cls, value: Any) -> Any:
        if value is None or isinstance(value, dict | EverySection):
            return value
        found = re.fullmatch(EVERY, value.strip()) if isinstance(value, str) else None
        if found is None:
            reason = f"is a number of steps or tokens, such as `200 steps` or `1_000_000 tokens`, got {value!r}"
            raise_problems("every", [KeyProblem((), reason, value)])
        return {f"{found[2]}s": int(found[1])}

    @model_validator(mode="after")
    def _check(self) -> EverySection:
        if (self.steps is None) == (self.tokens is None):
            raise_problems("every", [KeyProblem((), "needs exactly one of steps and tokens", None)])
        return self


class EvaluateSection(Section):
    """Suites run after a stage (and, for the first stage, before it; while it trains, as `every` says)."""

    suites: list[SuiteSection] = Field(
        default_factory=list,
        description="Packaged suites by name, suites in files, or suites spelt out: [math500, {suite: aime24, "
        "max_problems: 5}, mine.yaml]. `sft recipes` lists the packaged ones.",
    )
    before_first_stage: bool = Field(default=True, description="Evaluate the starting model too.")
    every: EverySection | None = Field(
        default=None,
        description="Answer suites while the stage trains, too: `200 steps`, `1_000_000 tokens`, or {steps: 200, "
        "suites: [math500], max_problems: 50}. What is trained stays the same, bit for bit.",
    )
    bf16: bool | None = Field(
        default=None,
        description="Answer in bfloat16, else in float32. Default: as `model.dtype` says, but in float32 where that is "
        "bfloat16, the processor doesn't multiply it and the model is small. A run keeps what it began with.",
    )
    verify_timeout: float = Field(
        default=5.0, gt=0, description="Seconds one answer check may take before it is killed."
    )
    verify_workers: int = Field(default=2, gt=0, description="Processes that check answers, on each machine.")

    @model_validator(mode="after")
    def _check(self) -> EvaluateSection:
        names = [suite.name for suite in self.suites]
        check_names("suites", names, RESERVED_SUITE_NAMES)
        if self.every is not None and not names:
            raise_problems("evaluate", [KeyProblem(("every",), "has no effect without suites", None)])
        asked = enumerate((self.every and self.every.suites) or [])
        unknown = [
            KeyProblem(("every", "suites", place), f"is none of the suites: {', '.join(names)}", name)
            for place, name in asked
            if name not in names
        ]
        if unknown:
            raise_problems("evaluate", unknown)
        return self

    def while_training(self) -> list[SuiteSection]:
        """The suites that `every` asks, cut to the problems that it asks."""
        if self.every is None:
            return []
        named, most = self.every.suites, self.every.max_problems
        limits = [[limit for limit in (suite.max_problems, most) if limit is not None] for suite in self.suites]
        return [
            suite.model_copy(update={"max_problems": min(limit, default=None)})
            for suite, limit in zip(self.suites, limits, strict=True)
            if named is None or suite.name in named
        ]


class Stage(Section):
    """One SFT stage: its own data, length and schedule; it starts from what the stage before it made."""

    name: Name = Field(description="What the stage is called: a folder of the run, and what --stage takes.")
    data: DataSection
    train: TrainSection = Field(default_factory=TrainSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    average: AverageSection | None = Field(
        default=None, description="What is averaged at the stage's end; default: nothing, or what train.ema keeps."
    )
    stop_when: StopSection | None = Field(default=None, description="When the stage ends before its last step.")
    keep_best: str | None = Field(
        default=None,
        description="A suite of the stage: of the checkpoints that save_total_limit keeps, the one with the highest "
        "pass@1 there is handed on.",
    )

    @model_validator(mode="after")
    def _check(self) -> Stage:
        told = self.train.evaluation_keys() if self.data.validation is None else {}
        reason = "has no effect without data.validation, which says what rows are held out"
        if told:
            raise_problems("stage", [KeyProblem(("train", key), reason, value) for key, value in told.items()])
        return self


class Defaults(Section):
    """Values that every stage shares; a stage's own value wins. Mappings are merged, lists replaced."""

    data: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    evaluate: dict[str, Any] = Field(default_factory=dict)


class PushSection(Section):
    """Where the result goes on the Hugging Face Hub."""

    repo_id: str | None = Field(default=None, description="e.g. my-name/my-model. None: no push.")
    private: bool = Field(default=True, description="Whether a new repository is private.")
    merge_lora: bool = Field(default=True, description="Merge LoRA adapters into the exported weights.")
    commit_message: str | None = Field(default=None, description="Of the commit on the Hub.")


class ReportSection(Section):
    """The run's report."""

    title: str | None = Field(default=None, description="Heading of the page. Default: the recipe's name.")


@dataclass(frozen=True)
class Given:
    """A recipe as its author gave it: the file's text, the overrides of the command line in order, and where each of
    its values was written."""

    text: str = field(default="", compare=False)
    overrides: tuple[str, ...] = field(default=(), compare=False)
    document: Document | None = field(default=None, compare=False, repr=False)


class Recipe(Section):
    """One run."""

    _given: Given = PrivateAttr(default_factory=Given)

    name: Name = Field(description="What the run is called, in its report and model card.")
    description: str | None = Field(default=None, description="What the run is for, for the model card.")
    output_dir: PathText = Field(description="Everything the run makes goes here.")
    prepared_dir: PathText | None = Field(
        default=None, description="Prepared data, keyed by content. Default: <output_dir>/prepared."
    )
    seed: Seed = Field(default=42, description="Of random weights, and of every stage that says none of its own.")
    variables: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="Values written as ${name} elsewhere, to be overridden in one place."
    )
    model: ModelSection
    defaults: Defaults = Field(default_factory=Defaults)
    stages: list[Stage] = Field(min_length=1)
    push: PushSection = Field(default_factory=PushSection)
    report: ReportSection = Field(default_factory=ReportSection)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        self.output_dir, self.prepared_dir = str(_at_home(self.output_dir)), _at_home(self.prepared_dir)
        check_names("stages", [stage.name for stage in self.stages], RESERVED_STAGE_NAMES)
        problems = [problem for stage in self.stages if (problem := stage.train.four_bit_problem(stage.name))]
        if self.model.load_in_4bit and problems:
            raise_problems("recipe", [KeyProblem(("model", "load_in_4bit"), reason, True) for reason in problems])
        for stage in self.stages:
            if "seed" not in stage.train.model_fields_set:
                stage.train.seed = self.seed
        return self

    @property
    def given(self) -> Given:
        """What `load_recipe` read; empty for a recipe that was made otherwise. Two recipes may differ in it."""
        return self._given

    def place(self, path: Path) -> str:
        """Where the value at `path` was written, and its path: `my.yaml:12: stages[0].name`, or the path alone."""
        document = self.given.document
        return show_path(path) if document is None else str(document.origin(path))

    def written(self) -> dict[str, Any]:
        """All but what the stages have been filled with; and their seed where it is the recipe's, so that another
        `--seed` reaches them."""
        kept = {key: value for key, value in super().written().items() if key not in ("variables", "defaults")}
        seed = ("seed", self.seed)
        trains = [{key: value for key, value in s.train.written().items() if (key, value) != seed} for s in self.stages]
        stages = [{**stage.written(), "train": train} for stage, train in zip(self.stages, trains, strict=True)]
        return {**kept, "stages": stages}

    def stage(self, name: str) -> Stage:
        """The stage called `name`. Raises UsageError with the names there are."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = ", ".join(stage.name for stage in self.stages)
        raise UsageError(f"the recipe {self.name} has no stage {name!r}; its stages are: {names}")


def _at_home(path: str | None) -> str | None:
    """`~/runs` as a path; a Hub id stays what it is."""
    return os.path.expanduser(path) if path is not None else None


def check_names(key: str, names: list[str], reserved: tuple[str, ...]) -> None:
    """Folders and overrides go by a list's names: no two may be the same, and none a word that means something else."""
    problems = []
    for index, name in enumerate(names):
        # Some file systems don't tell capital letters from small ones.
        before = next((other for other in range(index) if names[other].lower() == name.lower()), None)
        if name.lower() in reserved or name.isdigit():
            reason = f"can't be {name!r}: `sft` uses that word itself"
        elif before is not None and names[before] == name:
            reason = f"{name!r} is the name of {key}[{before}] already"
        elif before is not None:
            reason = f"{name!r} differs from {names[before]!r}, the name of {key}[{before}], by capital letters alone"
        else:
            continue
        problems.append(KeyProblem((key, index, "name"), reason, name))
    if problems:
        raise_problems(key, problems)
