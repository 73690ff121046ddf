"""With each kind of decoder, incremental text equals the decoded text, and token bytes add up to the bytes of the text."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from acip_platform.serve.engine.sampling import ScoredToken
from acip_platform.serve.text.detokenizer import Detokenizer
from acip_platform.serve.text.token_bytes import TokenBytes
from acip_platform.serve.text.token_logprobs import as_chat, as_completion, scored
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from tests.conftest import byte_tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "it", "did", "n't", "care", ".", "we", "went", "home", ",", "happy", "!"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
EMOJI = "🦙"


def fast_tokenizer(core: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")
    tokenizer.add_tokens([AddedToken("<|tool|>", special=False), AddedToken("Größe", special=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", special=True)]})
    return tokenizer


def byte_level() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|tool|>", special=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", special=True)]})
    return tokenizer


def metaspace(scheme: str) -> Any:
    vocabulary = {"<unk>": 0, "<s>": 1, **{word: i for i, word in enumerate([f"▁{word}" for word in WORDS] + ["▁", "ing", "s"], 2)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return fast_tokenizer(core)


def llama() -> Any:
    """Return a tokenizer with the decoder of Llama 2: Replace, ByteFallback, Fuse, Strip."""
    names = ["<unk>", "<s>", *BYTES, *(f"▁{word}" for word in WORDS), "▁", "e", "s", *"abcdefghi"]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0),
    ])  # fmt: skip
    return fast_tokenizer(core)


def wordpiece() -> Any:
    vocabulary = {name: i for i, name in enumerate(["<unk>", "<s>", *WORDS, "##s", "##ing", "##e"])}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return fast_tokenizer(core)


def end_of_word_suffix() -> Any:
    vocabulary = {name: i for i, name in enumerate(["<unk>", "<s>", *(f"{word}</w>" for word in WORDS), "un", "re"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", end_of_word_suffix="</w>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.BPEDecoder()
    return fast_tokenizer(core)


def word_level() -> Any:
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(["<unk>", "<s>", *WORDS])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast_tokenizer(core)


KINDS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level, "metaspace, always": lambda: metaspace("always"), "metaspace, never": lambda: metaspace("never"),
    "byte fallback": llama, "wordpiece": wordpiece, "</w>": end_of_word_suffix, "words": word_level, "ByT5": ByT5Tokenizer,
}  # fmt: skip


def detokenized(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer, prompt, [])
    return "".join([*(detokenizer.add(id) for id in ids), detokenizer.end()])


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def plain_ids(tokenizer: Any) -> list[int]:
    """Return the ids of tokens that consist of whole characters, without added and special tokens."""
    table = TokenBytes.of(tokenizer)
    ids = [id for id in range(len(tokenizer)) if id not in table.added and id not in table.special]
    return [id for id in ids if table[id].decode(errors="ignore").encode() == table[id]]


@pytest.mark.parametrize("kind", KINDS)
def test_incremental_text_equals_decoded_text(kind: str) -> None:
    tokenizer, draw = KINDS[kind](), random.Random(0)
    special = sorted(TokenBytes.of(tokenizer).special)
    for _ in range(60):
        ids = draw.choices(plain_ids(tokenizer), k=draw.randrange(1, 12))
        if kind != "</w>":  # this decoder replaces </w> by a space, except in the last token
            assert detokenized(tokenizer, [], ids) == decoded(tokenizer, ids)
        middle = draw.randrange(len(ids))
        mixed = [*ids[:middle], draw.choice(special), *ids[middle:]]
        assert detokenized(tokenizer, [], mixed) == detokenized(tokenizer, [], ids), "a special token must not change the text around it"
        if middle:
            parted = detokenized(tokenizer, [], ids[:middle]) + detokenized(tokenizer, ids[:middle], ids[middle:])
            assert parted == detokenized(tokenizer, [], ids), "an answer must continue its prompt, spaces included"


@pytest.mark.parametrize("kind", KINDS)
def test_token_bytes_add_up_to_the_text(kind: str) -> None:
    tokenizer, draw = KINDS[kind](), random.Random(1)
    table = TokenBytes.of(tokenizer)
    for _ in range(60):
        ids = draw.choices(plain_ids(tokenizer), k=8)
        assert b"".join(table[id] for id in ids[1:]).decode() == detokenized(tokenizer, ids[:1], ids[1:])


@pytest.mark.parametrize(("kind", "name"), [("byte-level", "<|tool|>"), ("byte fallback", "Größe"), ("metaspace, never", "Größe")])
def test_bytes_of_an_added_token_are_its_content(kind: str, name: str) -> None:
    tokenizer = KINDS[kind]()
    assert TokenBytes.of(tokenizer)[tokenizer.convert_tokens_to_ids(name)] == name.encode()


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "ByT5"])
def test_character_of_several_tokens_is_whole_in_text_and_split_in_bytes(kind: str) -> None:
    tokenizer = KINDS[kind]()
    table = TokenBytes.of(tokenizer)
    id_of = {table[id]: id for id in range(300 if kind != "ByT5" else 259) if len(table[id]) == 1 and id not in table.special}
    ids = [id_of[bytes([byte])] for byte in EMOJI.encode()]
    detokenizer = Detokenizer(tokenizer, [], [])
    assert [detokenizer.add(id) for id in ids] == ["", "", "", EMOJI]
    assert [table[id] for id in ids] == [bytes([byte]) for byte in EMOJI.encode()]
    assert detokenized(tokenizer, ids[:2], ids[2:]) == EMOJI, "a character may begin in the prompt"
    assert detokenized(tokenizer, ids[:2], plain_ids(tokenizer)[-1:]) == table[plain_ids(tokenizer)[-1]].decode()
    assert detokenized(tokenizer, [], ids[:3]) == "�"


def test_ids_beyond_the_vocabulary_have_no_text() -> None:
    assert TokenBytes.of(byte_level())[5000] == b""
    assert detokenized(byte_level(), [], [97, 5000, 98]) == "ab"


def test_each_token_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work per token does not grow, for letters, incomplete characters, and a long stop text that never completes."""
    tokenizer = byte_level()
    table = TokenBytes.of(tokenizer)
    assert [table[id] for id in (65, 97, 240)] == [b"A", b"a", b"\xf0"]
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_, **__: pytest.fail("a text was decoded again"))
    monkeypatch.setattr(type(tokenizer), "convert_tokens_to_string", lambda *_: pytest.fail("a text was decoded again"))
    letters = Detokenizer(tokenizer, [65], ["a" * 5000 + "b"])
    assert "".join(letters.add(97) for _ in range(20_000)) + letters.end() == "a" * 20_000
    incomplete = Detokenizer(tokenizer, [65], [])
    assert "".join(incomplete.add(240) for _ in range(20_000)) + incomplete.end() == "�" * 20_000


def until_stop(tokenizer: Any, ids: list[int], *stops: str) -> tuple[str, int | None]:
    """Return (the text, the number of tokens up to the stop or None)."""
    detokenizer, text = Detokenizer(tokenizer, [65], stops), ""
    for count, id in enumerate(ids, 1):
        text += detokenizer.add(id)
        if detokenizer.stopped:
            return text + detokenizer.end(), count
    return text + detokenizer.end(), None


def test_stop_texts_match_special_tokens() -> None:
    tokenizer = byte_level()
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    a, b, c = b"abc"
    assert until_stop(tokenizer, [a, end, b], "<|end|>") == ("a", 2)
    assert until_stop(tokenizer, [a, b, end, c], "b<|end|>") == ("a", 3)
    assert until_stop(tokenizer, [a, end, end, b, c], "<|end|>b") == ("a", 4)
    assert until_stop(tokenizer, [a, b, end, c], "c<|end|>") == ("abc", None)
    assert until_stop(tokenizer, [a, end, b, c], "ab", "c<|end|>") == ("", 3), (
        "a stop text must not occur in the text, even across a hidden token"
    )
    assert until_stop(tokenizer, [a, *b"<|en", b], "<|end|>") == ("a<|enb", None)


def test_first_complete_stop_text_wins_for_any_token_boundaries() -> None:
    tokenizer = byte_level()
    tool = tokenizer.convert_tokens_to_ids("<|tool|>")
    assert until_stop(tokenizer, [97, tool, 98], "<|tool|>b", "tool") == ("a<|", 2)
    assert until_stop(tokenizer, [97, *b"<|tool|>b"], "<|tool|>b", "tool") == ("a<|", 7)
    assert until_stop(tokenizer, list(b"aabaabaaac"), "aabaaac") == ("aab", 10), "a stop text may begin within a partial match"


def test_alternatives_with_the_same_text_do_not_overwrite_each_other() -> None:
    tokenizer = llama()
    table = TokenBytes.of(tokenizer)
    letter, byte = tokenizer.convert_tokens_to_ids("a"), tokenizer.convert_tokens_to_ids("<0x61>")
    lead, continuation = tokenizer.convert_tokens_to_ids("<0xF0>"), tokenizer.convert_tokens_to_ids("<0x9F>")
    token = scored(table, ScoredToken(lead, -0.5, ((lead, -0.5), (letter, -1.0), (byte, -2.0), (continuation, -3.0))), 3)
    completion = as_completion([token, scored(table, ScoredToken(letter, -4.0, ((lead, -0.5),)), 3), scored(table, ScoredToken(1), 0)])
    assert completion["top_logprobs"][0] == {"bytes:\\xf0": -0.5, "a": -1.0, f"token_id:{byte}": -2.0, "bytes:\\x9f": -3.0}
    assert completion["top_logprobs"][1] == {"bytes:\\xf0": -0.5, "a": -4.0}, "the token itself is always included"
    assert completion["top_logprobs"][2] is None and completion["token_logprobs"][2] is None
    assert completion["tokens"] == ["bytes:\\xf0", "a", "<s>"]
    assert as_chat([token])["content"][0]["bytes"] == [0xF0]
    assert [top["bytes"] for top in as_chat([token])["content"][0]["top_logprobs"]] == [[0xF0], [97], [97], [0x9F]]
