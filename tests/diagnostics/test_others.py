"""Models that no one here wrote: every probe runs on them and leaves no trace."""

import math
import warnings

import pytest
import torch
from test_subject import same, traces
from torch import nn

from normlab.diagnostics import dependence, landscape, propagation, stochasticity
from normlab.diagnostics.curvature import Curvature
from normlab.diagnostics.scale import scale
from normlab.diagnostics.subject import Subject

transformers = pytest.importorskip("transformers")


def images():
    return {"pixel_values": torch.randn(4, 3, 16, 16)}


def words():
    ids = torch.randint(0, 20, (3, 6))
    return {"input_ids": ids, "labels": ids}


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config), images()


def convnext():
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, num_labels=3
    )
    return transformers.ConvNextForImageClassification(config), images()


def vit():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=16, patch_size=8, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), images()


def gpt2():
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config), words()


def llama():
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), words()


def criterion(output, batch):
    labels = batch.get("labels")
    if labels is not None:
        return nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    return nn.functional.cross_entropy(output.logits, torch.arange(4) % 3)


@pytest.mark.parametrize("build", [resnet, convnext, vit, gpt2, llama])
def test_every_probe(build):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of that library
        model, batch = build()
    model.train()
    before = traces(model)
    with Subject(model, criterion, [batch]) as subject:
        layers = propagation.propagation(subject)
        assert len(layers) > 5
        assert sum(layer.gradient > 0 for layer in layers) > 5
        assert landscape.along_gradient(subject, 0.1, points=2).smoothness > 0
        assert len(landscape.covariate_shift(subject, 0.1)) > 2
        line = landscape.slice_losses(subject, [landscape.direction(subject)], points=3)
        assert line.isfinite().all()
        for kind in ("hessian", "gauss_newton"):
            assert Curvature(subject, kind).eigenvalues(steps=3).values.isfinite().all()
        found = scale(subject, span=build is resnet)
        assert all(math.isfinite(s.norm) for s in found)
        if build is resnet:  # every convolution has a batch normalizer behind it
            assert [s.name for s in found if s.invariant is None] == ["classifier.1"]
            assert len(stochasticity.stored(subject)) == len(stochasticity.noise(subject, 2)) > 3
            assert stochasticity.discrepancy(subject).output > 0
        assert len(dependence.by_layer(subject)) > 5
    same(traces(model), before)
