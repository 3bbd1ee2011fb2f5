"""Architectures that nobody here wrote, randomly initialised, on text and images that ship with the packages."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from evaluation.parts import IMAGES, Build, adam, adamw, characters, digits, jump, sgd, supervised, warmup
from evaluation.training import Training, healthy, sick


class Logits(nn.Module):
    """A model of the transformers library that returns its logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs).logits


def library(name: str, **options: Any) -> nn.Module:
    """Build a small causal language model or classifier by its configuration's name."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**options)
    kind = "ForImageClassification" if "image_size" in options else "ForCausalLM"
    made = getattr(transformers, f"{name}{kind}", None) or transformers.GPT2LMHeadModel
    return Logits(made(config))


def gpt2(layers: int = 2) -> nn.Module:
    return library(
        "GPT2",
        n_layer=layers,
        n_head=4,
        n_embd=32,
        vocab_size=64,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def llama(layers: int = 2) -> nn.Module:
    return library(
        "Llama",
        num_hidden_layers=layers,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=32,
    )


def neox(layers: int = 2) -> nn.Module:
    return library(
        "GPTNeoX",
        num_hidden_layers=layers,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=32,
    )


def vit(layers: int = 2) -> nn.Module:
    return library(
        "ViT",
        num_hidden_layers=layers,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
    )


def resnet() -> nn.Module:
    return library(
        "ResNet",
        image_size=8,
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 16, 24],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=10,
    )


def convnext() -> nn.Module:
    return library(
        "ConvNext",
        image_size=8,
        num_channels=1,
        patch_size=1,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_labels=10,
    )


def mobilenet() -> nn.Module:
    return library("MobileNetV2", image_size=32, num_channels=1, depth_multiplier=0.25, num_labels=10)


def opt() -> nn.Module:
    return library(
        "OPT",
        num_hidden_layers=2,
        hidden_size=32,
        ffn_dim=64,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=32,
        dropout=0.0,
        word_embed_proj_dim=32,
    )


def text(model: nn.Module, build: Build, **options: Any) -> Training:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return supervised(model, build, lambda _step: characters(8, 32), loss, **options)


def pictures(model: nn.Module, build: Build, *, scale: int = 1, **options: Any) -> Training:
    return digits(
        model, build, inputs=IMAGES.repeat_interleave(scale, 2).repeat_interleave(scale, 3), size=32, **options
    )


def larger(at: int, factor: float) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def spoil(step: int, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (inputs * factor if step == at else inputs), labels.roll(1) if step == at else labels

    return spoil


def broken(at: int) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def spoil(step: int, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (inputs * torch.nan if step == at else inputs), labels

    return spoil


if find_spec("transformers") is not None:
    healthy("gpt2_adamw", lambda: text(gpt2(), adamw(1e-3), before=warmup(1e-3, 20)), steps=60)
    healthy("gpt2_4_layers", lambda: text(gpt2(4), adamw(1e-3)), steps=40)
    healthy("gpt2_fine_rate", lambda: text(gpt2(), adamw(2e-5)), steps=60)
    healthy("llama_adamw", lambda: text(llama(), adamw(1e-3)), steps=60)
    healthy("llama_clipped", lambda: text(llama(3), adamw(3e-3), before=warmup(3e-3, 20), clip=1.0), steps=50)
    healthy("neox_adam", lambda: text(neox(), adam(1e-3)), steps=60)
    healthy("vit_adamw", lambda: digits(vit(), adamw(1e-3), inputs=IMAGES, size=32), steps=60)
    sick(
        "gpt2_rate_1",
        "exploding nonfinite dead spike vanishing",
        "learning_rate",
        lambda: text(gpt2(), adamw(1.0)),
        steps=40,
    )
    sick("gpt2_sgd_1e8", "stalled", "learning_rate", lambda: text(gpt2(), sgd(1e-8)), steps=40)
    sick(
        "llama_rate_jumps_at_30",
        "exploding nonfinite dead spike vanishing",
        "learning_rate",
        lambda: text(llama(), adamw(1e-3), before=jump(1e-3, 1000, 30)),
        steps=60,
        onset=30,
    )
    sick(
        "llama_no_zero_grad",
        "exploding spike",
        "accumulation",
        lambda: text(llama(), adamw(1e-3), clears=False),
        steps=40,
    )
    sick(
        "gpt2_bfloat16_1e6",
        "stalled",
        "precision learning_rate",
        lambda: text(gpt2().bfloat16(), adamw(2e-6)),
        steps=40,
    )
    sick(
        "vit_head_only_optimized",
        "unoptimized",
        "graph",
        lambda: digits(vit(), adamw(), inputs=IMAGES, size=32, parameters=lambda m: m.inner.classifier.parameters()),
        steps=40,
    )

    healthy("opt_adamw", lambda: text(opt(), adamw(1e-3), before=warmup(1e-3, 20)), steps=60)
    healthy("resnet_sgd", lambda: pictures(resnet(), sgd(0.05, momentum=0.9)), steps=60)
    healthy("resnet_adam", lambda: pictures(resnet(), adam(1e-3)), steps=60)
    healthy("convnext_adamw", lambda: pictures(convnext(), adamw(1e-3)), steps=60)
    healthy("mobilenet_adam", lambda: pictures(mobilenet(), adam(1e-3), scale=4), steps=30)
    sick(
        "resnet_rate_50",
        "exploding nonfinite dead saturated vanishing",
        "learning_rate",
        lambda: pictures(resnet(), sgd(50.0)),
        steps=40,
    )
    sick(
        "convnext_adam_1",
        "exploding nonfinite dead vanishing",
        "learning_rate",
        lambda: pictures(convnext(), adam(1.0)),
        steps=40,
    )
    sick(
        "resnet_nan_batch",
        "nonfinite",
        "data",
        lambda: pictures(resnet(), adam(), spoil=broken(20)),
        steps=30,
        onset=20,
    )
    sick(
        "convnext_batch_x1000",
        "spike exploding nonfinite",
        "data",
        lambda: pictures(convnext(), adamw(1e-3), spoil=larger(40, 1000.0)),
        steps=60,
        onset=40,
    )
