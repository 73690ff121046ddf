"""The engine that the serving tests run with: the embedded one, or vLLM if the environment variable ACIP_TEST_ENGINE is "vllm"."""

import os
from pathlib import Path

import pytest
import torch
from acip_platform.serve.replica import model_kind
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.small import GOLDEN, byte_tokenizer

ENGINE = os.environ.get("ACIP_TEST_ENGINE", "acip")
Resident = model_kind(ENGINE)
embedded_only = pytest.mark.skipif(ENGINE != "acip", reason="it is about the embedded engine")

HEAD_DIM = 32  # vLLM's kernels for CPUs have no smaller heads
STEPS = 200


def write_wide_base(folder: Path) -> Path:
    """Write a model like that of golden/, with wider heads, into a new `folder`. Its attention is trained for seconds."""
    torch.manual_seed(0)
    golden = AutoModelForCausalLM.from_pretrained(GOLDEN / "base")
    config = AutoConfig.from_pretrained(GOLDEN / "base")
    config.head_dim = HEAD_DIM
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict({name: tensor for name, tensor in golden.state_dict().items() if "attn" not in name}, strict=False)
    tokens_BT = load_file(GOLDEN / "batches.safetensors")["batches"].long()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(STEPS):
        batch = tokens_BT[torch.randint(len(tokens_BT), (16,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
