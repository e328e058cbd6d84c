from types import SimpleNamespace

import pytest

from pipelines.training_log import EVERY, Progress, described


def test_a_line_on_a_step_tells_loss_speed_and_the_time_that_is_left():
    figures = {"samples_per_second": 12.34, "seconds_left": 125.4}
    assert described(20, 1.5, figures) == "step 20, loss 1.500, 12.3 samples/s, 2:05 left"
    assert described(3, 2.0, {"samples_per_second": 1.0}) == "step 3, loss 2.000, 1.0 samples/s"


def test_speed_counts_all_samples_of_all_processes_and_no_validation(monkeypatch):
    clock, told = [100.0], []
    monkeypatch.setattr("pipelines.training_log.time.monotonic", lambda: clock[0])
    trainer = SimpleNamespace(
        global_step=0, accumulate_grad_batches=2, world_size=3, max_steps=4 * EVERY, callbacks=[],
        is_global_zero=True,
    )  # fmt: skip
    module = SimpleNamespace(log_dict=told.append)
    progress = Progress(batch_size=4, on_terminal=False)
    progress.on_train_start(trainer, module)
    clock[0] += 2.0
    progress.on_validation_start(trainer, module)
    clock[0] += 50.0
    progress.on_validation_end(trainer, module)
    clock[0] += 3.0
    trainer.global_step = EVERY
    progress.on_train_batch_end(trainer, module, None, None, 0)
    [figures] = told
    assert figures["samples_per_second"] == pytest.approx(EVERY * 4 * 2 * 3 / 5)
    assert figures["seconds_left"] == pytest.approx(3 * 55)
