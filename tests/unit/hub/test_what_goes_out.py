"""Every card, licence, recipe, manifest, report and line that goes out: no secret, no folder of this machine, no claim
that isn't so."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import TOKEN, HubServer

from sft.data.steps.generate.answer import CHAT, Request
from sft.data.steps.generate.client import Client, RequestFailedError
from sft.hub.card import licence_text, model_card
from sft.hub.export import export
from sft.hub.folder import MANIFEST, list_files
from sft.hub.provenance import run_record, write_recipe
from sft.hub.push import push
from sft.recipe import RunPaths, load_recipe, resolved_yaml
from sft.recipe.steps.generate import Endpoint
from sft.report import write_report
from sft.utils.errors import UserError
from sft.utils.files import read_json, sha256_file, write_json, write_sealed
from sft.utils.secrets import is_secret_name, published, scrub

FACTS = {
    "model_type": "qwen3",
    "architecture": "Qwen3ForCausalLM",
    "dtype": "bfloat16",
    "parameters": 5,
    "layers": 2,
    "hidden_size": 8,
    "vocab_size": 16,
    "has_tokenizer": True,
    "has_template": True,
    "adapter_base": None,
    "transformers": "5",
    "merge": None,
    "reload": None,
}
CARD = "---\nlibrary_name: transformers\n---\n"
SECRETS = (
    "hunter2secret",
    "sk-proj-abcd1234efgh5678ijkl",
    "ghp_abcdefghij0123456789abcdefghij",
    "Zq8plainkey",
    "over9ride",
)
RECIPE = """\
name: my-run
description: |
  Asked https://me:hunter2secret@gate.example/v1 with password hunter2secret, from /mnt/team/rows.jsonl.
output_dir: {root}/run
variables: {{teacher_key: Zq8plainkey, db_password: none, size: small}}
model: {{model_name_or_path: {model}}}
stages:
  - name: a
    data:
      sources: [{{path: {data}}}]
      steps:
        - generate:
            teacher:
              base_url: https://me:hunter2secret@gate.example/v1?api_key=Zq8plainkey&size=${{size}}
              model: teacher
              extra_body:
                key: ${{teacher_key}}
                reasoning_effort: high
                headers: {{Authorization: "Bearer sk-proj-abcd1234efgh5678ijkl", X-Route: east}}
                note: ghp_abcdefghij0123456789abcdefghij
                user: ${{db_password}}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose recipe is full of secrets, begun from a folder and on data that are called like those of the Hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(root=tmp_path, model="models/llama", data="data/mine"))
    override = ["--variables.db_password", "over9ride"]
    loaded = load_recipe(recipe, override)
    paths = RunPaths(loaded)
    paths.root.mkdir()
    paths.given.write_text(loaded.given.text)
    paths.resolved.write_text(resolved_yaml(loaded))
    told = {"resolved": sha256_file(paths.resolved), "overrides": list(loaded.given.overrides)}
    write_sealed(paths.manifest, told)
    return paths.root


def went_out(run: Path, folder: Path) -> dict[str, str]:
    """Every text that an export and a report of `run` show, by name."""
    folder.mkdir()
    record = run_record(run)
    write_recipe(run, folder)
    recipe = load_recipe(run.parent / "r.yaml", ["--variables.db_password", "over9ride"])
    page = write_report(recipe, RunPaths(recipe))
    return {
        "card": model_card(record, FACTS),
        "licence": licence_text(record, FACTS),
        "record": json.dumps(record),
        "recipe": (folder / "recipe.yaml").read_text(),
        "page": page.read_text(),
        "report": page.with_name("report.md").read_text(),
    }


def test_no_secret_and_no_folder_of_this_machine_goes_out(run: Path, tmp_path: Path) -> None:
    texts = went_out(run, tmp_path / "out")
    for name, text in texts.items():
        assert [secret for secret in SECRETS if secret in text] == [], name
        assert str(tmp_path) not in text and "/mnt/team" not in text and str(Path.home()) + "/" not in text, name
    # What tells no secret stays, and the recipe is still one.
    recipe = yaml.safe_load(texts["recipe"])
    teacher = recipe["stages"][0]["data"]["steps"][0]["generate"]["teacher"]
    assert teacher["base_url"] == "https://REDACTED@gate.example/v1?api_key=REDACTED&size=small"
    assert teacher["extra_body"]["reasoning_effort"] == "high"
    assert teacher["extra_body"]["headers"] == {"Authorization": "REDACTED", "X-Route": "east"}
    assert "reasoning_effort: high" in texts["page"] and "gate.example" in texts["card"]
    (tmp_path / "again.yaml").write_text(texts["recipe"])
    load_recipe(tmp_path / "again.yaml")


def test_a_folder_called_like_a_hub_model_is_none(run: Path, tmp_path: Path) -> None:
    texts = went_out(run, tmp_path / "out")
    metadata = yaml.safe_load(texts["card"].split("---\n")[1])
    assert not {"base_model", "datasets", "license", "language"} & set(metadata)
    assert "huggingface.co" not in texts["card"] and "fine-tuned from a local checkpoint" in texts["card"]
    assert "from scratch" not in texts["licence"] and "a local folder" in texts["licence"]


@pytest.mark.parametrize(
    ("start", "read", "licence"),
    [
        ({"files": {}}, {"source": "org/rows", "files": []}, "derive from a model in a local folder"),
        ({"hub": "org/base", "commit": "c"}, {"source": "org/rows:train", "hub": "org/rows"}, "derive from org/base"),
    ],
)
def test_what_was_read_decides_what_it_was(run: Path, start: Any, read: Any, licence: str) -> None:
    """Whatever lies under that name when the card is written."""
    (run / "manifest.json").unlink()
    stage = {"name": "a", "data": {"sources": [{"path": "org/rows"}]}}
    model = {"model_name_or_path": "org/base"}
    (run / "resolved.yaml").write_text(yaml.safe_dump({"name": "x", "model": model, "stages": [stage]}))
    write_sealed(run / "stages" / "a" / "manifest.json", {"parts": {"start": start}, "data": {"inputs": [read]}})
    card = model_card(run_record(run), FACTS)
    metadata = yaml.safe_load(card.split("---\n")[1])
    hub = "hub" in start
    assert metadata.get("base_model") == ("org/base" if hub else None)
    assert metadata.get("datasets") == (["org/rows"] if hub else None)
    assert licence in licence_text(run_record(run), FACTS)


def test_the_licence_of_weights_of_unknown_origin_claims_nothing() -> None:
    text = licence_text(None, FACTS)
    assert "from scratch" not in text and "derive from a" not in text
    assert "trained from scratch" in licence_text({"start": {"kind": "scratch"}}, FACTS)


def test_a_card_tells_of_the_stages_that_the_model_has_seen(run: Path) -> None:
    (run / "manifest.json").unlink()
    stages = [{"name": name, "data": {"sources": [{"path": f"org/{name}"}]}} for name in "ab"]
    model = {"model_name_or_path": "org/base"}
    (run / "resolved.yaml").write_text(yaml.safe_dump({"name": "x", "model": model, "stages": stages}))
    for name in "ab":
        write_sealed(run / "stages" / name / "manifest.json", {"data": {}})
        write_sealed(run / "eval" / name / "s" / "metrics.json", {"suite": "s", "pass_at_1": 0.5})
    card = model_card(run_record(run, "a"), FACTS)
    assert "in 1 stage " in card and "after a" in card and "after b" not in card and "org/b " not in card


@pytest.mark.parametrize(
    "name",
    (
        "api_key apiKey X-Api-Key OPENAI_API_KEY hub_token token client_secret dbPassword passwd Authorization auth "
        "aws_secret_access_key X-Amz-Signature x-goog-api-key credentials"
    ).split(),
)
def test_names_that_say_secret(name: str) -> None:
    assert is_secret_name(name)
    assert published({name: "abc", "list": [{name: ["x"]}]}) == {name: "REDACTED", "list": [{name: ["REDACTED"]}]}


@pytest.mark.parametrize(
    "name",
    ["eos_token", "pad_token", "max_tokens_key", "api_key_env", "tokenizer", "max_tokens", "supervised_tokens", "key"],
)
def test_names_that_say_none(name: str) -> None:
    assert published({name: "abc"}) == {name: "abc"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgres://u:p@ss@db:5/x", "postgres://REDACTED@db:5/x"),
        ("https://h/v1?sig=a%2Fb&x=1#access_token=q", "https://h/v1?sig=REDACTED&x=1#access_token=REDACTED"),
        ("Authorization: Bearer abc.def-123456", "Authorization: Bearer <token>"),
        ("api key: opensesame, then", "api key: REDACTED, then"),
        ("AKIAABCDEFGHIJKLMNOP", "<token>"),
        ("hf_abcdefghijklmnopqrst", "<token>"),
        ("the token is the next one; 1/2 and km/h; sk-learn", "the token is the next one; 1/2 and km/h; sk-learn"),
        ("see https://h/a?page=2", "see https://h/a?page=2"),
    ],
)
def test_secrets_in_texts(text: str, shown: str) -> None:
    assert scrub(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/mnt/team/rows.jsonl", ".../rows.jsonl"),
        ("from /scratch/me/run, and", "from .../run, and"),
        ("/home/alice/x", "~/x"),
        ("in /Users/bob/rows now", "in ~/rows now"),
        ("data/mine.jsonl", "data/mine.jsonl"),
        ("/no_think", "/no_think"),
        ("<think>a</think> https://h/data/x", "<think>a</think> https://h/data/x"),
    ],
)
def test_folders_in_texts(text: str, shown: str) -> None:
    assert published(text) == shown


def test_a_secret_of_the_environment_stays_there(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "swordfish-of-ours")
    (run / "manifest.json").unlink()
    (run / "resolved.yaml").write_text("name: x\ndescription: made with swordfish-of-ours\nstages: []\n")
    assert "swordfish" not in json.dumps(run_record(run))


def test_retry_lines_and_refusals_hold_no_secret(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setenv("TEACHER", "Zq8plainkey")
    settings: dict[str, Any] = {"api_key_env": "TEACHER", "max_retries": 1, "retry_delay": 0.01, "timeout": 5.0}
    url = "http://me:hunter2secret@127.0.0.1:9/v1?token=Zq8plainkey"
    client = Client(Endpoint(base_url=url, model="m", extra_body={"api_key": "other8key"}, **settings))

    async def ask() -> str:
        request = Request("teacher", CHAT, {"model": "m", "messages": [{"role": "user", "content": "x"}]}, 0)
        with pytest.raises(RequestFailedError) as caught:
            await client.ask(request)
        await client.close()
        return str(caught.value)

    with caplog.at_level(logging.WARNING):
        text = asyncio.run(ask())
    with pytest.raises(UserError) as ended:
        client._give_up("refused the key Zq8plainkey, other8key", "pay")
    said = text + caplog.text + client.where + str(ended.value)
    assert "asking again in" in said and "127.0.0.1" in said
    assert not any(secret in said for secret in ("hunter2secret", "Zq8plainkey", "other8key"))


# ---- the folder ----


def test_a_foreign_map_of_classes_does_not_go_along(sambay: tuple[Any, Any], tmp_path: Path) -> None:
    """As of Phi-3: transformers has its class, and the files that its configuration names don't travel."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config, Phi3ForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 0}
    start = tmp_path / "phi3"
    Phi3ForCausalLM(Phi3Config(**sizes, **heads)).save_pretrained(start)
    sambay[1].save_pretrained(start)
    classes = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "org/x--modeling_phi3.Phi3"}
    for name, mapped in (("config.json", classes), ("tokenizer_config.json", {"AutoTokenizer": ["tok.Tok", None]})):
        write_json(start / name, {**read_json(start / name), "auto_map": mapped})
    out = export(start, tmp_path / "out", dtype="bfloat16")
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in read_json(out / name)
    assert read_json(out / MANIFEST)["reload"]["exact"], "compared in the type of the file"
    for trust in (True, False):
        assert AutoModelForCausalLM.from_pretrained(out, trust_remote_code=trust)
        assert AutoTokenizer.from_pretrained(out, trust_remote_code=trust)


def test_another_weight_than_was_written_is_refused(
    sambay: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one tensor, which no tolerance of logits would show."""
    import sft.hub.export as module

    write = module.save_model

    def flipped(folder: Path, *args: Any, **options: Any) -> int:
        count = write(folder, *args, **options)
        path = next(folder.glob("*.safetensors"))
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
        return count

    monkeypatch.setattr(module, "save_model", flipped)
    with pytest.raises(UserError, match="1 tensors aren't what was written"):
        export(sambay, tmp_path / "out", dtype="bfloat16")


def test_the_tokenizer_is_loaded_without_a_question(
    sambay_export: Path, monkeypatch: pytest.MonkeyPatch, sambay: tuple[Any, Any]
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    card = (sambay_export / "README.md").read_text()
    assert "AutoTokenizer.from_pretrained(name, trust_remote_code=False)" in card
    tokenizer = AutoTokenizer.from_pretrained(sambay_export, trust_remote_code=False)
    assert tokenizer("What is 17 * 23?")["input_ids"] == sambay[1]("What is 17 * 23?")["input_ids"]


def test_an_adapters_local_base_is_named_by_its_whole_path(
    sambay: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(
        tmp_path / "models" / "llama"
    )
    monkeypatch.chdir(tmp_path)
    base = Qwen3ForCausalLM.from_pretrained("models/llama")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = "models/llama"
    out = export((adapted, sambay[1]), tmp_path / "out", merge_lora=False, check=False)
    assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == str(tmp_path / "models" / "llama")
    card = (out / "README.md").read_text()
    assert "base_model" not in card.split("---\n")[1] and str(tmp_path) not in card
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="which nobody else can load"):
        push(out, "me/x", endpoint="http://127.0.0.1:9", token=TOKEN)


# ---- the Hub ----


def edit(hub: HubServer, name: str, text: str) -> None:
    repo = hub.store.repos["models/tester/model"]
    hub.store.commit(repo, "main", {**hub.files("tester/model"), name: hub.store.regular(text.encode())}, "by hand")


@pytest.fixture
def send(hub: HubServer, fake_export: Path) -> Callable[..., Any]:
    def sending(**options: Any) -> Any:
        return push(fake_export, "tester/model", endpoint=hub.endpoint, token=TOKEN, verify=False, **options)

    return sending


def sha256(hub: HubServer, name: str) -> str:
    return str(hub.files("tester/model")[name]["sha256"])


def test_a_card_edited_on_the_hub_stays(
    hub: HubServer, fake_export: Path, send: Callable[..., Any], seal: Callable[..., None]
) -> None:
    send()
    edit(hub, "README.md", "my own words")
    mine = sha256(hub, "README.md")
    (fake_export / "README.md").write_text(CARD + "a new card")
    (fake_export / "config.json").write_text('{"new": 1}')
    seal(fake_export)
    lines: list[str] = []
    result = send(progress=lines.append)
    assert result.kept == ["README.md"] and "config.json" in result.uploaded and "README.md" not in result.uploaded
    assert sha256(hub, "README.md") == mine and any("was edited there and is kept" in line for line in lines)
    assert send().kept == ["README.md"], "it stays the next time, too"
    replaced = send(replace_card=True)
    assert replaced.uploaded == ["README.md"] and sha256(hub, "README.md") == sha256_file(fake_export / "README.md")


def test_a_card_that_only_we_pushed_is_replaced(
    hub: HubServer, fake_export: Path, send: Callable[..., Any], seal: Callable[..., None]
) -> None:
    send()
    for text in ("by hand, here", "again by hand, here"):
        (fake_export / "README.md").write_text(CARD + text)
        assert send().uploaded == ["README.md"]
    (fake_export / "README.md").write_text(CARD + "a new export's")
    seal(fake_export)
    result = send()
    assert not result.kept and sha256(hub, "README.md") == sha256_file(fake_export / "README.md")
    assert {file.path for file in list_files(fake_export)} == {
        name for name in hub.files("tester/model") if name[0] != "."
    }


def test_a_card_that_was_there_first_stays(hub: HubServer, send: Callable[..., Any]) -> None:
    hub.store.create("models/tester/model", "private")
    edit(hub, "README.md", "---\nlicense: apache-2.0\n---\n")
    before = sha256(hub, "README.md")
    assert send().kept == ["README.md"] and sha256(hub, "README.md") == before


def test_a_commit_message_tells_no_secret(hub: HubServer, send: Callable[..., Any]) -> None:
    send(commit_message=f"with {TOKEN} from /mnt/team/run")
    assert TOKEN not in json.dumps(hub.store.repos["models/tester/model"]["commits"])
    assert "/mnt/team" not in json.dumps(hub.store.repos["models/tester/model"]["commits"])
