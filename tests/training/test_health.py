"""Counting, spike windows and the agreement to stop, each by itself, against plain oracles."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megalr.config.checks import cross_problems
from megalr.config.health import HealthConfig
from megalr.distributed import watchdog as watchdog_module
from megalr.distributed.signals import STOP_SIGNALS, STOPPING, StopRequest
from megalr.distributed.stop_vote import StopVote
from megalr.distributed.watchdog import Watchdog
from megalr.engine.skip_step import HostCopy, poison_nonfinite
from megalr.errors import RANK_VARIABLES, AgreedError
from megalr.restarts.spikes import SpikeWindow
from megalr.training.health import Health
from megalr.training.step import StepResult
from megalr.training.step_log import LogWindow, PendingMetrics


def _spikes_by_numpy(values: np.ndarray, window: int, threshold: float) -> list[int]:
    """Places of the spikes: mean and sample deviation of the finite values before, by numpy."""
    found = []
    for place, value in enumerate(values):
        before = values[:place]
        before = before[np.isfinite(before)][-window:]
        enough = np.isfinite(value) and len(before) >= max(2, window // 2)
        if enough and value > before.mean() + threshold * before.std(ddof=1):
            found.append(place)
    return found


@pytest.mark.parametrize("window, threshold", [(8, 3.0), (128, 6.0), (5, 1.5)])
def test_spikes_are_those_that_numpy_finds(window: int, threshold: float) -> None:
    rng = np.random.default_rng(3)
    values = 4 + 0.1 * rng.standard_normal(600) - np.linspace(0, 2, 600)
    values[[70, 71, 200, 450]] += [2.0, 1.0, 5.0, 0.8]
    values[300:] += 3.0  # a lasting rise
    values[[90, 210]] = [np.nan, np.inf]
    expected = _spikes_by_numpy(values, window, threshold)
    ours = SpikeWindow("loss", window, threshold)
    found = []
    for place, value in enumerate(values.tolist()):
        spike = ours.observe(value)
        if spike is not None:
            found.append(place)
            before = values[:place][np.isfinite(values[:place])][-window:]
            assert spike.mean == pytest.approx(before.mean())
            assert spike.deviations == pytest.approx((value - before.mean()) / before.std(ddof=1))
        if place == 250:  # through a checkpoint
            state = ours.state_dict()
            ours = SpikeWindow("loss", window, threshold)
            ours.load_state_dict(state)
    assert found == expected
    assert expected and len(expected) < 100


def test_only_skips_in_a_row_count_and_rollbacks_end() -> None:
    health = Health(HealthConfig(max_skipped=3, max_rollbacks=2))
    assert [health.count(applied) for applied in (False, False, True, False, False, False)] == [
        *[False] * 5,
        True,
    ]
    assert (health.skipped, health.skipped_in_row) == (5, 3)
    saved = Health(HealthConfig()).state_dict()
    health.count_rollback(6, "3 updates in a row were skipped")
    health.go_back(saved)
    assert (health.skipped, health.skipped_in_row, health.rollbacks) == (5, 0, 1)
    health.count_rollback(9, "the loss spiked")
    with pytest.raises(AgreedError, match=r"the loss spiked at update 12 after 2 rollbacks"):
        health.count_rollback(12, "the loss spiked")
    again = Health(HealthConfig())
    again.load_state_dict(health.state_dict())
    assert again.state_dict() == health.state_dict()


def test_without_a_threshold_nothing_is_a_spike() -> None:
    health = Health(HealthConfig(spike_threshold=None, spike_action="rollback", spike_window=4))
    assert not health.decides_after_step and not health.decides_before_step
    assert not any(health.spikes(loss=value) for value in (1.0, 1.0, 1.1, 1.0, 99.0))


def test_skipping_spikes_is_refused_with_cuda_graphs() -> None:
    values = {"health.spike_action": "skip", "train.cuda_graphs": True}
    assert [key for key, _ in cross_problems(values.get)] == ["health.spike_action"]
    values["train.cuda_graphs"] = False
    assert not list(cross_problems(values.get))


def test_the_mean_loss_leaves_skipped_updates_out() -> None:
    made = [
        StepResult(n, n - 1, targets, (targets,), 0.1, torch.tensor(total), skipped=not applied)
        for n, targets, total, applied in [
            (1, 10, 30.0, True),
            (2, 20, 9e9, False),
            (3, 5, 5.0, True),
        ]
    ]
    PendingMetrics(made, copies=1).wait()
    interval = LogWindow(made)
    assert interval.mean_loss() == pytest.approx(35.0 / 15)
    assert interval.targets == 35
    assert interval.samples_by_source() == [35]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ),
    ],
)
def test_what_is_coming_is_what_was_there_when_it_started(device: str) -> None:
    values = torch.tensor([[1.5, math.nan], [-2.0, math.inf]], device=device)
    coming = HostCopy(values)
    values.zero_()
    torch.testing.assert_close(
        coming.read(), torch.tensor([[1.5, math.nan], [-2.0, math.inf]]), equal_nan=True
    )


def test_a_guarded_loss_is_itself_or_spoils_the_gradient() -> None:
    for value, spoilt in ((3.0, False), (float("inf"), True), (float("nan"), True)):
        weight = torch.tensor(0.1, requires_grad=True)
        loss = weight * 7 + value  # the derivative alone is 7, whatever the value
        ours = poison_nonfinite(loss)
        ours.backward()
        assert weight.grad is not None
        if spoilt:
            assert weight.grad.isnan()
        else:
            assert torch.equal(ours, loss) and weight.grad == 7


def test_signals_are_only_remembered_and_the_first_one_counts() -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        request = StopRequest().listen()
        assert request.signal == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal == signal.SIGUSR1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_second_ctrl_c_ends_at_once_unless_it_is_the_first_passed_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    now = [0.0]
    try:
        request = StopRequest(clock=lambda: now[0]).listen()
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGINT
        assert capfd.readouterr().out == f"\n{STOPPING}"
        now[0] = 0.5
        os.kill(os.getpid(), signal.SIGINT)
        assert capfd.readouterr().out == ""
        now[0] = 2.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setenv("RANK", "1")
        StopRequest().listen()
        os.kill(os.getpid(), signal.SIGINT)
        assert capfd.readouterr().out == ""
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ranks_ask_about_once_a_second_and_sooner_when_told_to(tmp_path: Path) -> None:
    now = [0.0]
    request = StopRequest()
    stop = StopVote(request, tmp_path, torch.device("cpu"), clock=lambda: now[0])
    voted = []
    for call in range(200):
        now[0] += 0.09  # seconds an update
        before = stop._voted
        assert not stop.requested()
        if stop._voted != before:
            voted.append(call)
    gaps = np.diff(voted)
    assert list(gaps[:4]) == [2, 4, 8, 11] and set(gaps[4:]) == {11}
    assert not stop.requested(now=True)
    request.signal = int(signal.SIGTERM)
    assert stop.requested() and stop.reason == "SIGTERM"  # the next call votes


def test_a_stop_file_is_seen_and_removed(tmp_path: Path) -> None:
    stop = StopVote(StopRequest(), tmp_path, torch.device("cpu"))
    (tmp_path / "stop").touch()
    assert not stop.requested(now=True)  # it may be meant for the job that has the folder
    stop.folder_is_ours = True
    assert stop.requested(now=True) and stop.reason == "stop_file"
    stop.acknowledge()
    assert not (tmp_path / "stop").exists()
    stop.acknowledge()  # harmless


def test_bytes_written_by_a_long_save_are_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    barked = threading.Event()
    monkeypatch.setattr(Watchdog, "_end", lambda self: barked.set())
    with (
        (tmp_path / "big").open("wb", 0) as file,
        Watchdog(1.5, tmp_path, 0) as watchdog,
        watchdog.transferring("saving"),
    ):
        for _ in range(25):
            file.write(bytes(100_000))
            time.sleep(0.1)
        assert not barked.is_set()
        assert barked.wait(30)  # nothing is written any more
    assert not watchdog._thread.is_alive()
    with Watchdog(0, tmp_path, 0) as watchdog:
        assert not watchdog._thread.is_alive()
    assert watchdog_module.STALLED == 3
