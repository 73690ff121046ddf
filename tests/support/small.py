"""The small byte-level Llama of golden/, for code that may import only the dependencies of acip."""

import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

GOLDEN = Path(__file__).parents[1] / "golden" / "reference-trace"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer that golden's model was trained with. A token id is the value of a byte."""
    alphabet = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in alphabet.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[2], bos_token=alphabet[1])


def write_small_base(folder: Path) -> Path:
    """Write golden's model and its tokenizer into a new `folder` in transformers' format, and return it."""
    shutil.copytree(GOLDEN / "base", folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
