"""20 steps straight = 10 + a signal + the same call again, bit for bit; what a resume refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from train_toys import read_metrics, saved_weights, signal_at, tiny_qwen, tiny_sambay, toy_rows, train_toy

from sft.train.interrupt import Interrupted, Stopped, stop_signals
from sft.utils.errors import UserError
from sft.utils.signals import STOP_SIGNALS

GROUPS = [{"match": "lambda_|A_log", "learning_rate": 1e-3, "weight_decay": 0.1}, {"match": "fc1", "weight_decay": 0.2}]
CASES = {
    "packed": (tiny_sambay, {"packing": True, "per_device_train_batch_size": 2}),
    "lora": (tiny_sambay, {"packing": True, "per_device_train_batch_size": 2, "use_peft": True, "lora_dropout": 0.1}),
    "muon": (tiny_sambay, {"per_device_train_batch_size": 2, "optim": "muon", "param_groups": GROUPS}),
    "accumulation": (tiny_sambay, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}),
    "ordinary model": (tiny_qwen, {"packing": True, "per_device_train_batch_size": 3, "logging_steps": 4}),
    "by length": (tiny_qwen, {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2}),
}
COMPARED = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens")
COMPARED += ("mean_token_accuracy", "entropy")


def compared(path):
    return [{key: line[key] for key in COMPARED} for line in read_metrics(path)]


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_straight_bit_for_bit(tmp_path, monkeypatch, case):
    make, train = CASES[case]
    train = {**train, "max_steps": 20, "save_steps": 6}
    prepared = toy_rows(13, packed=bool(train.get("packing")))
    straight, paths = train_toy(tmp_path / "straight", train, model=make(), prepared=prepared)
    with monkeypatch.context() as patch:
        signal_at(patch, 10)
        with pytest.raises(Interrupted, match="Stopped at step 10 of 20 of stage one") as stopped:
            train_toy(tmp_path / "resumed", train, model=make(), prepared=prepared)
    assert stopped.value.exit_code == 143
    torch.manual_seed(12345)
    # All weights come from the checkpoint; with LoRA the frozen ones come from the model that is passed.
    model = make() if train.get("use_peft") else make(seed=9)
    resumed, again = train_toy(tmp_path / "resumed", train, model=model, prepared=prepared)
    lines = compared(again.metrics("one"))
    assert lines == compared(paths.metrics("one"))
    every = train.get("logging_steps", 1)
    assert [line["step"] for line in lines] == list(range(every, 21, every))
    weights, expected = saved_weights(again.final_dir("one")), saved_weights(paths.final_dir("one"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert resumed["counters"]["tokens"] == straight["counters"]["tokens"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, monkeypatch, capsys, file):
    """One bit of it is enough, and an empty or foreign trainer_state.json; what is made is the same."""
    train = {"max_steps": 6, "save_steps": 2}
    _, layout = train_toy(tmp_path / "straight", train)
    with monkeypatch.context() as patch:
        signal_at(patch, 4)
        with pytest.raises(Interrupted):
            train_toy(tmp_path / "damaged", train)
    damaged = tmp_path / "damaged/stages/one/checkpoint-4" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(b"[]" if file == "trainer_state.json" else content)
    _, again = train_toy(tmp_path / "damaged", train)
    assert "checkpoint-4 is damaged, going on from checkpoint-2\n" in capsys.readouterr().err
    assert compared(again.metrics("one")) == compared(layout.metrics("one"))
    weights, expected = saved_weights(again.final_dir("one")), saved_weights(layout.final_dir("one"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_killed_between_the_last_step_and_the_hand_over(tmp_path, monkeypatch):
    """No step too many is trained."""
    train = {"max_steps": 5, "save_steps": 5}
    _, paths = train_toy(tmp_path / "straight", train)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sft.train.job.save_final", killed)
        with pytest.raises(KeyboardInterrupt):
            train_toy(tmp_path / "killed", train)
    assert not (tmp_path / "killed/stages/one/manifest.json").exists()
    manifest, again = train_toy(tmp_path / "killed", train, model=tiny_qwen(seed=7))
    assert manifest["steps"] == 5
    assert compared(again.metrics("one")) == compared(paths.metrics("one"))
    weights = saved_weights(again.final_dir("one"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved_weights(paths.final_dir("one")).items())


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, 2)
        with pytest.raises(Interrupted):
            train_toy(tmp_path, {"max_steps": 6})
    with pytest.raises(UserError, match=r"train\.learning_rate was 0\.01, is now 0\.5\. .*--restart one"):
        train_toy(tmp_path, {"max_steps": 6, "learning_rate": 0.5})
    prepared = toy_rows(4, packed=False)
    prepared.manifest["key"] = "other data"
    with pytest.raises(UserError, match="data was toy, is now other data"):
        train_toy(tmp_path, {"max_steps": 6}, prepared=prepared)


def test_how_often_is_told_and_saved_may_change_and_is_used(tmp_path, monkeypatch):
    """transformers goes on with what the checkpoint was made with."""
    with monkeypatch.context() as patch:
        signal_at(patch, 2)
        with pytest.raises(Interrupted):
            train_toy(tmp_path, {"max_steps": 8, "save_steps": 100})
    train = {"max_steps": 8, "save_steps": 2, "save_total_limit": 3, "logging_steps": 3}
    manifest, layout = train_toy(tmp_path, train)
    assert manifest["steps"] == 8
    assert sorted(p.name for p in (tmp_path / "stages/one").glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-8",
    ]
    assert [line["step"] for line in read_metrics(layout.metrics("one"))] == [1, 2, 3, 6]


def test_an_adapter_is_not_continued_on_another_base(tmp_path, monkeypatch):
    train = {"max_steps": 4, "use_peft": True}
    with monkeypatch.context() as patch:
        signal_at(patch, 2)
        with pytest.raises(Interrupted):
            train_toy(tmp_path, train)
    with pytest.raises(UserError, match=r"base\.content was \w+\.\.\., is now"):
        train_toy(tmp_path, train, model=tiny_qwen(seed=9))


def test_a_signal_at_the_last_step_finishes_the_stage_and_then_stops(tmp_path, monkeypatch):
    signal_at(monkeypatch, 3, signal.SIGINT)
    with pytest.raises(Interrupted, match="Stopped after stage one, which is done") as stopped:
        train_toy(tmp_path, {"max_steps": 3})
    assert stopped.value.exit_code == 130
    assert json.loads((tmp_path / "stages/one/manifest.json").read_text())["steps"] == 3


@pytest.mark.parametrize("moment", ["sft.train.job.save_final", "sft.train.hand_on.write_sealed"])
def test_a_signal_in_the_hand_over_stops_after_it(tmp_path, monkeypatch, moment):
    """What is handed on is written to its end, and the next stage isn't begun."""
    original = resolve_name(moment)

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGUSR1)
        return original(*args, **kwargs)

    monkeypatch.setattr(moment, signalled)
    with pytest.raises(Interrupted, match="Stopped after stage one") as stopped:
        train_toy(tmp_path, {"max_steps": 2})
    assert stopped.value.exit_code == 138
    assert saved_weights(tmp_path / "stages/one/final")
    assert json.loads((tmp_path / "stages/one/manifest.json").read_text())["steps"] == 2


def test_before_the_first_step_a_signal_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("sft.train.probe.choose_collator", lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped) as stopped:
        train_toy(tmp_path, {"max_steps": 2})
    assert stopped.value.exit_code == 143


def test_handlers_are_put_back():
    before = [signal.getsignal(s) for s in STOP_SIGNALS]
    with stop_signals() as signals, signals.saving():
        assert all(callable(signal.getsignal(s)) for s in STOP_SIGNALS)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert [signal.getsignal(s) for s in STOP_SIGNALS] == before


def test_inner_contexts_share_the_run_s_signals():
    with stop_signals() as outer:
        with pytest.raises(Stopped), stop_signals() as inner:
            assert inner is outer
            signal.raise_signal(signal.SIGINT)
        # Something has swallowed it; it is told at the next look.
        with pytest.raises(Stopped, match="SIGINT"):
            outer.check()
        outer.forget()
        outer.check()


def test_outside_the_main_thread_no_handler_is_set():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter():
        with stop_signals() as signals:
            seen.append((signal.getsignal(signal.SIGTERM), signals.received))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(60)
    assert seen == [(before, None)]


TWICE = """
import os, signal, sys, time
from sft.train.interrupt import stop_signals
with stop_signals() as signals, signals.saving():
    os.kill(os.getpid(), int(sys.argv[2]))
    print(signals.received, flush=True)
    time.sleep(float(sys.argv[1]))
    os.kill(os.getpid(), int(sys.argv[3]))
    print("still here", flush=True)
"""


@pytest.mark.parametrize("launcher", [False, True])
def test_a_second_signal_stops_at_once(launcher):
    """A process of torchrun may hear of one signal twice, when the sender reaches the whole group."""
    environment = {**os.environ, **({"TORCHELASTIC_RUN_ID": "x"} if launcher else {})}
    done = {}
    for pause in ("0", "2.5"):
        command = [sys.executable, "-c", TWICE, pause, "15", "15"]
        done[pause] = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done["2.5"].returncode == -signal.SIGTERM and done["2.5"].stdout == "15\n"
    assert done["0"].returncode == (0 if launcher else -signal.SIGTERM)
    assert "SIGTERM: saving, then stopping" in done["0"].stderr


@pytest.mark.parametrize(("second", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 0)])
def test_another_signal_is_no_echo(second, status):
    """But for SIGTERM: a SIGUSR1 to the whole group ends torchrun, and its death is told by one."""
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x"}
    command = [sys.executable, "-c", TWICE, "0", str(int(signal.SIGUSR1)), str(int(second))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert "a second signal, 2 seconds from now or later, stops at once" in done.stderr


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM])
def test_a_terminal_that_goes_away_is_a_sigterm_that_nobody_repeats(first):
    """The system tells of it, and the shell does; systemd does after a SIGTERM."""
    command = [sys.executable, "-c", TWICE, "0", str(int(first)), str(int(signal.SIGHUP))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "15\nstill here\n"), done.stderr
    assert f"{first.name}: saving, then stopping" in done.stderr


AFTERWARDS = """
import os, sys, time
from sft.train.interrupt import stop_signals
with stop_signals() as signals, signals.saving():
    os.kill(os.getpid(), 15)
os.kill(os.getpid(), 15)
print("told why", flush=True)
time.sleep(2.5)
os.kill(os.getpid(), 15)
print("still here", flush=True)
"""


def test_an_echo_does_not_end_what_is_about_to_tell_why_it_stopped():
    """A launcher that dies brings a SIGTERM for each of its threads, the last one late on a busy machine."""
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x"}
    command = [sys.executable, "-c", AFTERWARDS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "told why\n"), done.stderr


LEARNED = """
import os, signal, sys, time
from sft.train.interrupt import stop_signals
with stop_signals() as signals, signals.saving():
    signals.learn(15)
    os.kill(os.getpid(), 15)
    print(signals.received, flush=True)
    time.sleep(2.5)
    os.kill(os.getpid(), 15)
    print("still here", flush=True)
"""


@pytest.mark.parametrize("launcher", [False, True])
def test_what_another_process_heard_sooner_is_no_second_signal(launcher):
    """It ended a process that was saving, where the sender reaches one after the other."""
    environment = {**os.environ, **({"TORCHELASTIC_RUN_ID": "x"} if launcher else {})}
    command = [sys.executable, "-c", LEARNED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "15\n"), done.stderr


class Finalized:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)
        self.over = True


def test_a_signal_in_a_finalizer_is_not_lost(capfd):
    """Python prints what is raised there, and goes on."""
    with pytest.raises(Stopped, match="SIGTERM"), stop_signals() as signals:
        Finalized()
        assert signals.received == signal.SIGTERM
        for _ in range(1000):
            time.sleep(0.01)
    assert "Traceback" not in capfd.readouterr().err


def test_a_fork_of_the_run_dies_of_its_signals():
    with stop_signals():
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)  # bounded: it has raised a signal, or ends
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


GROUP = """
import os, signal, sys
from pathlib import Path
from train_toys import tiny_qwen, toy_rows, train_toy
from sft.train.callbacks import StopOnSignal
from sft.train.interrupt import Interrupted

original = StopOnSignal.on_step_end

def on_step_end(self, args, state, control, **kwargs):
    if state.global_step == 3:
        os.killpg(0, int(sys.argv[2]))
    return original(self, args, state, control, **kwargs)

StopOnSignal.on_step_end = on_step_end
train = {"max_steps": 400, "dataloader_num_workers": 2, "per_device_train_batch_size": 1}
try:
    train_toy(Path(sys.argv[1]), train, model=tiny_qwen(), prepared=toy_rows(300, packed=False))
except Interrupted as stopped:
    print(stopped)
    sys.exit(stopped.exit_code)
"""


@pytest.mark.parametrize(
    "number", [STOP_SIGNALS[0], *(pytest.param(n, marks=pytest.mark.slow) for n in STOP_SIGNALS[1:])]
)
def test_a_signal_to_the_whole_group_is_saved_on(tmp_path, number):
    """A terminal's Ctrl-C and a scheduler's signals reach the workers of the data loader too."""
    support = str(Path(__file__).parents[2] / "support")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([support, str(Path(support).parents[1])])}
    command = [sys.executable, "-c", GROUP, str(tmp_path), str(int(number))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, start_new_session=True, timeout=200)
    assert done.returncode == 128 + (signal.SIGTERM if number == signal.SIGHUP else number), done.stderr[-3000:]
    assert "everything saved" in done.stdout and "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "stages/one").glob("checkpoint-*")] == ["checkpoint-3"]


def test_interrupted_exit_codes():
    assert Interrupted("x", signal.SIGINT).exit_code == Stopped(signal.SIGINT).exit_code == 130
    assert Interrupted("x", signal.SIGTERM).exit_code == Stopped(signal.SIGTERM).exit_code == 143
    assert Interrupted("x", signal.SIGUSR1).exit_code == Stopped(signal.SIGUSR1).exit_code == 138


@pytest.mark.parametrize("kind", ["os", "torch"])
def test_a_full_disk_is_told(tmp_path, monkeypatch, kind):
    """torch.save reports a full disk as a RuntimeError about stream positions: there the disk's free space tells."""
    error = OSError(28, "No space left on device") if kind == "os" else RuntimeError("unexpected pos 64 vs 0")

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr("torch.save", full)
    usage = shutil.disk_usage(tmp_path)
    if kind == "torch":
        with pytest.raises(RuntimeError, match="unexpected pos"):
            train_toy(tmp_path / "room left", {"max_steps": 2, "save_steps": 1})
        monkeypatch.setattr("shutil.disk_usage", lambda folder: usage._replace(free=100))
        monkeypatch.setattr("sft.train.space.Room.check_start", lambda *args: None)  # which would have seen it
        monkeypatch.setattr("sft.train.space.Room.check_save", lambda *args: None)
    with pytest.raises(UserError, match=r"The disk is full at .*: make room and give the same command again"):
        train_toy(tmp_path / "full", {"max_steps": 2, "save_steps": 1})


def test_a_checkpoint_that_does_not_fill_the_model_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, 2)
        with pytest.raises(Interrupted):
            train_toy(tmp_path, {"max_steps": 4})
    with pytest.raises(UserError, match=r"doesn't fit the model \(11 tensors missing .* --restart one"):
        train_toy(tmp_path, {"max_steps": 4}, model=tiny_qwen(num_hidden_layers=3))
