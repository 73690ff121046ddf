"""Text is sampled from a base model: deterministic documents and chats from its whole distribution."""

import pytest
import torch

from acip.base import Base, load_base
from acip.errors import BaseModelError, DataError
from acip.self_text import BATCH, first_tokens, sample
from tests.conftest import byte_tokenizer

T = 24
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_batch_is_a_function_of_the_seed_and_its_number(base: Base) -> None:
    """It depends neither on the state of torch's generator nor on the generation settings of the model, and changes neither."""
    first = sample(base.model, base.tokenizer, T, seed=1, batch=0)
    state, own = torch.get_rng_state(), base.model.generation_config
    own.update(top_k=1, temperature=0.1, repetition_penalty=5.0, do_sample=True)
    assert sample(base.model, base.tokenizer, T, seed=1, batch=0) == first
    assert base.model.generation_config is own and torch.equal(torch.get_rng_state(), state)
    assert sample(base.model, base.tokenizer, T, seed=2, batch=0) != first != sample(base.model, base.tokenizer, T, seed=1, batch=2)


def test_documents_are_continuations_of_a_random_first_token(base: Base) -> None:
    """They are as probable as the model's own samples must be: after the first token, their loss is near the entropy of the model."""
    rows = sample(base.model, base.tokenizer, 64, seed=0, batch=0)
    assert 0 < len(rows) <= BATCH and all(0 < row["tokens"] <= 62 for row in rows)
    assert len({row["text"][0] for row in rows}) > 10
    assert not any(row["text"][0].isspace() for row in rows)
    loss, entropy = [], []
    for row in rows:
        ids = torch.tensor([[*first_tokens(base.tokenizer), *row["text"].encode()]])
        with torch.no_grad():
            logp = base.model(input_ids=ids).logits[0, 1:-1].log_softmax(-1)
        loss.append(-logp.gather(1, ids[0, 2:, None]))
        entropy.append(-(logp.exp() * logp).sum(-1))
    assert float(torch.cat(loss).mean()) == pytest.approx(float(torch.cat(entropy).mean()), rel=0.1)


def test_every_second_text_is_a_chat_if_there_is_a_template(base: Base) -> None:
    tokenizer = byte_tokenizer()
    assert all("text" in row for row in sample(base.model, tokenizer, T, seed=0, batch=0))
    tokenizer.chat_template = TEMPLATE
    rows = sample(base.model, tokenizer, 64, seed=0, batch=0)
    assert ["messages" in row for row in rows[:20]] == [False, True] * 10
    for row in rows:
        if "text" in row:
            continue
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        user, assistant = (message["content"] for message in row["messages"])
        assert 0 < len(user.encode()) <= 32 and assistant and "</" not in user


def test_a_text_ends_at_the_end_token(base: Base) -> None:
    """The end token here is a frequent letter."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "e"
    rows = sample(base.model, tokenizer, 64, seed=0, batch=0)
    assert all("e" not in row["text"] and row["tokens"] < 63 for row in rows)


def test_a_model_that_writes_nothing_is_refused(small_base: str) -> None:
    base = load_base(small_base, "float32")
    silent = torch.nn.Linear(96, 256)
    with torch.no_grad():
        silent.weight.zero_()
        silent.bias.copy_(100.0 * (torch.arange(256) == base.tokenizer.eos_token_id))
    base.model.lm_head = silent
    with pytest.raises(DataError, match="ends its texts at once"):
        sample(base.model, base.tokenizer, T, seed=0, batch=0)


def test_windows_without_room_for_a_message_or_longer_than_the_context_are_refused(base: Base) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ 'x' * 30 }}" + TEMPLATE
    with pytest.raises(DataError, match=r"takes 36 of the 72 tokens of a window: no message .* Use a longer seq_len"):
        sample(base.model, tokenizer, 72, seed=0, batch=0)
    most = base.model.config.max_position_embeddings
    with pytest.raises(BaseModelError, match=f"seq_len is {most + 1}, but this model has {most} positions. Use a smaller seq_len"):
        sample(base.model, byte_tokenizer(), most + 1, seed=0, batch=0)


def test_a_document_begins_with_the_start_of_a_text_else_bos_else_eos() -> None:
    tokenizer = byte_tokenizer()
    assert first_tokens(tokenizer) == [1]
    tokenizer.bos_token = None
    assert first_tokens(tokenizer) == [2]
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no start token and no end token"):
        first_tokens(tokenizer)
