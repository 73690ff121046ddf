"""Text processing of a resident model: its tokenizer, chat template, stop texts and answer formats."""

import functools
import threading
import weakref
from typing import Any

from acip_platform.serve.engine.resident_model import ResidentModel
from acip_platform.serve.text.errors import InvalidRequestError
from acip_platform.serve.text.structured_output import AnswerFormat, AnswerFormats

_by_model: "weakref.WeakKeyDictionary[ResidentModel, ModelText]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class ModelText:
    """The conversion of the requests of one model to tokens. Use `ModelText.of`, which makes one object per model."""

    def __init__(self, name: str, tokenizer: Any, vocabulary: int, end_tokens: frozenset[int]) -> None:
        self.name, self.tokenizer, self.vocabulary, self.end_tokens = name, tokenizer, vocabulary, end_tokens

    @classmethod
    def of(cls, model: ResidentModel) -> "ModelText":
        """Return the text processing of this model. It holds no reference to the model, so that the model can leave memory."""
        with _lock:
            if model not in _by_model:
                _by_model[model] = cls(model.name, model.tokenizer, model.vocabulary, model.end_tokens)
            return _by_model[model]

    @property
    def chat(self) -> bool:
        """Whether the model has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @functools.cached_property
    def formats(self) -> AnswerFormats:
        return AnswerFormats(self.name, self.tokenizer, self.vocabulary, self.end_tokens)

    def format_of(self, request: Any) -> AnswerFormat | None:
        """Return the format that a request sets for its answers; None for free text. Raise an InvalidRequestError if it is not possible."""
        requested = any(getattr(request, name, None) is not None for name in ("response_format", "tools", "tool_choice"))
        return self.formats.of(request) if requested else None

    def encode(self, request: Any) -> list[list[int]]:
        """Return the token ids of each prompt of a completion, or of a chat. Raise an InvalidRequestError if it is not possible."""
        if hasattr(request, "messages"):
            return [self._encode_chat(request)]
        encoded = []
        for prompt in request.prompts:
            ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
            if not ids and self.tokenizer.bos_token_id is not None:
                ids = [self.tokenizer.bos_token_id]
            if not ids:
                message = "the prompt is empty, and this model has no start token; give at least one character."
                raise InvalidRequestError(message, "prompt")
            encoded.append(ids)
        return encoded

    def _encode_chat(self, request: Any) -> list[int]:
        if not self.chat:
            message = f"{self.name} has no chat template; use POST /v1/completions with a prompt."
            raise InvalidRequestError(message, "messages", "no_chat")
        if request.has_tools and "tool" not in str(self.tokenizer.chat_template):
            message = f"the chat template of {self.name} has no tools, so it does not accept messages of tools; leave them out."
            raise InvalidRequestError(message, "messages", "no_tools")
        tools = [tool.model_dump(exclude_none=True) for tool in self.formats.tools(request) or ()] or None
        try:
            text = self.tokenizer.apply_chat_template(request.template_messages, tools=tools, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything
            raise InvalidRequestError(f"the chat template of {self.name} rejects these messages: {error}", "messages") from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise InvalidRequestError(
                "the chat template returns an empty text for these messages; send a message with content.", "messages"
            )
        if max(ids) >= self.vocabulary:
            message = f"messages holds token {max(ids)}; {self.name} has tokens 0 to {self.vocabulary - 1}."
            raise InvalidRequestError(message, "messages")
        return ids


def stop_texts(model: ResidentModel, request: Any) -> list[str]:
    """Return the texts that end an answer: those of the request, and `stop_strings` of the model's generation config."""
    stated = model.settings.config.stop_strings or []
    return [*request.stops, *([stated] if isinstance(stated, str) else stated)]
