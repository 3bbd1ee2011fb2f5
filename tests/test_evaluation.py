"""Runs of the evaluation suite with clear margins, trained live: the right alert, its cause, or silence."""

from __future__ import annotations

import pytest
import torch
from evaluation.recording import record
from evaluation.replay import Ablation, replay
from evaluation.suite import RUNS
from evaluation.training import begin

import gradwatch

SICK = [
    "sigmoid_12x32_sgd",
    "sigmoid_written_out",
    "relu_20_default",
    "tanh_cubed",
    "very_deep_underflow",
    "batch_norm_in_eval_mode",
    "weight_decay_1",
    "tanh_5_std_1",
    "inputs_x1000_tanh",
    "constant_initialisation",
    "bias_minus_20",
    "encoder_detached",
    "branch_through_numpy",
    "softmax_over_one_unit",
    "gan_generator_detached",
    "only_the_head_is_optimized",
    "adam_rate_1",
    "loss_summed",
    "targets_x1000",
    "rate_x1000_adam_at_50",
    "no_zero_grad_clipped",
    "cnn_8_triple_he",
    "relu_rnn_gain_2",
    "gru_closed_gates",
    "log_of_zero",
    "nan_in_the_batch",
    "float16_overflow",
    "batch_x300_adam",
    "adam_rate_1e9",
    "adam_eps_1",
    "rate_x1e6_lower_at_30",
    "schedule_over",
    "bfloat16_adam_1e5",
]
HEALTHY = [
    "mlp_3_adam",
    "cnn_3_batch_norm",
    "lstm_adding_20",
    "transformer_pre_norm",
    "residual_zero_branch",
    "lora",
    "siren",
    "gates_shut",
    "staircase_warmup",
    "fine_tuning_1e5_adam",
    "converged_hinge",
    "random_labels",
    "experts_routed",
    "alternating_heads",
    "gan",
    "momentum_encoder",
    "change_of_task",
    "sparse_reward",
    "accumulation_clipped",
    "cosine_to_zero",
]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def live(name):
    """Train a run as a user would; return its alerts of warning or above."""
    run = RUNS[name]
    training = begin(run, 0)
    memory = gradwatch.MemorySink()
    with gradwatch.watch(training.model, training.optimizer, sinks=[memory]) as watch:
        for step in range(run.steps):
            training.run(step, watch.log_loss)
    return [alert for alert in watch.alerts if alert.severity != "info"]


@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_is_named_with_its_cause_and_a_remedy(name):
    run = RUNS[name]

    alerts = live(name)

    assert alerts
    assert alerts[0].step >= run.onset
    assert alerts[0].kind in run.kinds
    assert alerts[0].cause in run.causes
    assert all(cause.evidence and cause.remedy for cause in alerts[0].causes)


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_hears_nothing(name):
    assert live(name) == []


@pytest.mark.parametrize("name", ["relu_20_default", "tanh_5_std_1", "no_zero_grad_sgd", "zero_head", "adam_rate_1"])
def test_a_replayed_recording_gives_the_alerts_that_live_training_gives(name):
    run = RUNS[name]

    replayed = replay(run, 0, record(run, 0), Ablation()).alerts

    assert [(a.key, a.first_step, a.cause) for a in replayed] == [(a.key, a.first_step, a.cause) for a in live(name)]


def test_the_suite_is_large_and_split_in_two():
    sick = [run for run in RUNS.values() if run.is_sick]

    assert len(sick) >= 80
    assert len(RUNS) - len(sick) >= 120
    assert {run.half for run in sick} == {"development", "test"}
