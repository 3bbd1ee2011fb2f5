"""What to write, by cause and case. Each was tried on runs that had the cause; what did not cure is not advised."""

from __future__ import annotations

from gradwatch.diagnosis.case import Case

RELU_INIT = 'nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")'
TANH_INIT = "nn.init.orthogonal_(layer.weight)"


def remedy(cause: str, case: Case) -> str:
    """Return one or two sentences with the code to write."""
    return _REMEDIES[cause](case)


def _activation(case: Case) -> str:
    if case.alert.symptom in ("zero", "dead_units"):
        _, operation = case.last_operation
        if operation == "softmax":
            return "Give the logits to the loss (nn.CrossEntropyLoss), or use nn.Sigmoid() for a single unit."
        return "Leave the output without an activation, or use nn.LeakyReLU() or nn.GELU() where units die."
    if case.alert.kind == "nonfinite":
        return "Use an activation that does not grow faster than its input, such as nn.ReLU() or nn.GELU()."
    return (
        f"Replace the activation by nn.Tanh() or by nn.ReLU() together with {RELU_INIT} (nn.ReLU() alone does not "
        "help), or keep it and add residual connections or nn.BatchNorm1d. A larger rate does not help."
    )


def _initialization(case: Case) -> str:
    if case.probe is not None and case.probe.frozen_statistics and case.alert.kind == "vanishing":
        return "Call model.train() before training, so that batch normalisation uses the statistics of the batch."
    if case.alert.symptom == "symmetry":
        name = case.alert.layers[0] if case.alert.layers else "layer"
        return f"Draw the weights of {name} at random, for instance with {RELU_INIT}."
    if case.alert.kind == "dead":
        return f"Initialise with {RELU_INIT} and nn.init.zeros_(layer.bias)."
    if case.opening.logits > 6:
        return "Initialise the query and key projections with nn.init.xavier_uniform_(layer.weight)."
    init = TANH_INIT if case.probe is not None and "tanh" in case.probe.operations else RELU_INIT
    if case.alert.kind == "saturated":
        init = "nn.init.xavier_normal_(layer.weight)"
    rate = "" if case.is_adaptive else " and lower the rate to suit, or use torch.optim.Adam"
    return f"Initialise every hidden layer with {init}{rate}; or add residual connections around the layers."


def _learning_rate(case: Case) -> str:  # noqa: PLR0911 - one sentence a case
    symptom, name = case.alert.symptom, case.snapshot.optimizer_facts.name
    if symptom == "decay":
        return "Lower weight_decay to at most 0.1, with torch.optim.AdamW in place of L2 in torch.optim.Adam."
    if symptom == "rate_gone":
        return "End the run here, or give the scheduler more steps (T_max, total_steps) or a floor (eta_min)."
    if case.alert.kind == "stalled" or symptom == "update_small":
        if case.eps_decides:
            smaller = min(1e-8, case.gradient_rms / 100)
            return f"Lower eps: torch.optim.{name}(..., eps={smaller:.0e}); or scale the loss up."
        if case.clipped_away is not None:
            return f"Raise the clipping limit (now {case.snapshot.clipped_norm:.1e}) to the usual norm."
        return f"Raise the learning rate (now {case.rate:.3g}): an update of about 1e-3 of the weights is usual."
    if case.alert.kind == "vanishing" and case.has_norm_layers:
        return (
            f"Warm the rate up from 0 over the first 60 steps or more, lower it (now {case.rate:.3g}), or use pre-norm."
        )
    if case.opening.output_gradient > 0.05 and case.opening.output_elements >= 64 and not case.rate_jumped:
        return 'Average the loss over the batch (reduction="mean"), or divide the learning rate by the batch size.'
    if case.is_adaptive:
        return f"Lower the learning rate (now {case.rate:.3g}) tenfold; clipping does not make {name}'s steps smaller."
    return (
        f"Lower the learning rate (now {case.rate:.3g}) tenfold, or clip with "
        "torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)."
    )


def _precision(case: Case) -> str:
    if case.alert.symptom == "rounding":
        return "Keep float32 weights and compute in bfloat16 with torch.autocast, in place of model.bfloat16()."
    if case.alert.kind == "nonfinite" and not case.is_float16:
        return "Keep the operation away from its pole: torch.clamp(p, min=1e-8) before log, torch.sqrt(x + 1e-12)."
    return "Use torch.amp.GradScaler for float16, or bfloat16, whose range is that of float32."


def _data(case: Case) -> str:
    if case.batch_was_bad or case.alert.kind == "spike":
        clip = "clip at ten times the usual norm: torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)"
        look = f"Look at the batch of step {max(case.history.bad_batch, case.alert.first_step)}; drop it, or {clip}."
        name = case.snapshot.optimizer_facts.name
        return (
            f"{look} What remains of it is in {name}'s moments: a lower rate does not help."
            if case.is_adaptive
            else look
        )
    if case.alert.kind == "dead":
        return "Look at one batch before training: assert inputs.abs().max() > 0."
    if case.alert.kind == "nonfinite":
        return "Check inputs and targets with torch.isfinite(batch).all() before the forward pass."
    if case.opening.input_rms > 5:
        return "Standardise the inputs: x = (x - mean) / std, with mean and std of the training set."
    return "Scale the targets to a standard deviation of about one."


def _recurrence(case: Case) -> str:
    if case.alert.kind in ("exploding", "nonfinite"):
        return (
            "Initialise the recurrent weights with nn.init.orthogonal_(rnn.weight_hh_l0) and clip as well: "
            "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)."
        )
    return (
        "Initialise the recurrent weights with nn.init.orthogonal_(rnn.weight_hh_l0); for an LSTM raise the forget "
        "gate's bias to about log(T) and the rate with it. Shorter sequences or attention help surely, these often."
    )


def _graph(case: Case) -> str:
    layer = case.alert.layers[0] if case.alert.layers else "the layer"
    if case.alert.kind == "unoptimized":
        return (
            f"Give {layer} to the optimizer: optimizer.add_param_group({{'params': model.{layer}.parameters()}}), "
            f"or freeze it with model.{layer}.requires_grad_(False)."
        )
    if case.alert.symptom == "detached":
        return f"Remove what cuts the graph behind {layer}: detach(), torch.no_grad(), argmax, .item(), NumPy."
    return f"Look for an operation without a gradient behind {layer}: detach(), argmax, round, clamp out of range."


def _accumulation(_case: Case) -> str:
    return "Call optimizer.zero_grad() before each loss.backward(), once an optimizer step."


def _depth(case: Case) -> str:
    return (
        f"Add residual connections (x + block(x)) around every one or two of the {case.depth} layers, normalise, "
        "or use fewer layers."
    )


_REMEDIES = {
    "activation": _activation,
    "initialization": _initialization,
    "learning_rate": _learning_rate,
    "precision": _precision,
    "data": _data,
    "recurrence": _recurrence,
    "graph": _graph,
    "accumulation": _accumulation,
    "depth": _depth,
}
