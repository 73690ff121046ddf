"""Running a model one block at a time gives the logits of the whole model, or a clear error."""

import pytest
import torch
from torch import nn
from transformers import FalconConfig, LlamaConfig, T5Config, T5ForConditionalGeneration

from acip.errors import BaseModelError
from acip.layers.block_chain import BlockChain, placed, tensors
from tests.acip.layers.test_architectures import ARCHITECTURES, GROUPED, random_model

IDS_1T = torch.arange(3, 15)[None]
CHAINS = ("llama-tied", "llama-untied-biases", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "opt-pre-norm", "opt-post-norm", "gpt-neox")


@pytest.mark.parametrize("name", CHAINS)
def test_logits_are_those_of_the_whole_model(name: str) -> None:
    model = random_model(ARCHITECTURES[name].config)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    chain = BlockChain(model)
    chain.check(IDS_1T)
    assert len(chain) == 2
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all("forward" not in vars(block) for block in chain.blocks.values()), "the model computes as before"


def test_a_model_whose_blocks_exchange_more_than_hidden_states_is_refused() -> None:
    class Counting(nn.Module):
        """A block whose output depends on how often another block was called."""

        calls = 0

        def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
            type(self).calls += 1
            return hidden_states + type(self).calls

    model = random_model(LlamaConfig(**GROUPED))
    model.model.layers[1] = Counting()
    with pytest.raises(BaseModelError, match="exchange more than hidden states"):
        BlockChain(model).check(IDS_1T)


def test_blocks_that_return_a_tuple_are_refused() -> None:
    model = random_model(FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    with pytest.raises(BaseModelError, match="the blocks of this model return a tuple"):
        BlockChain(model).check(IDS_1T)


def test_an_encoder_with_a_decoder_is_refused() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
    with pytest.raises(BaseModelError, match="has 2 lists of blocks; it must have one"):
        BlockChain(model)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = random_model(LlamaConfig(**GROUPED))
    chain = BlockChain(model)
    with pytest.raises(RuntimeError):
        chain.block(0, IDS_1T, torch.zeros(1, 12, 7))
    chain.check(IDS_1T)


def test_parts_and_outside_cover_the_model() -> None:
    model = random_model(LlamaConfig(**GROUPED))
    chain = BlockChain(model)
    inside = {id(tensor) for block in chain.blocks.values() for tensor in tensors(block)}
    outside = {id(tensor) for tensor in chain.outside()}
    assert not inside & outside
    assert inside | outside == {id(tensor) for tensor in tensors(model)}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    parts = chain.parts(layers)
    assert [set(part) for part in parts] == [{name for name in layers if f"layers.{i}." in name} for i in (0, 1)]


def test_placed_tensors_return_to_their_place() -> None:
    layer = nn.Linear(4, 3)
    weight, address = layer.weight, layer.weight.data_ptr()
    context = placed(tensors(layer), "cpu")
    with context:
        layer.weight.data = torch.zeros(3, 4)  # as if it were on another device
    assert layer.weight is weight
    assert layer.weight.data_ptr() == address
