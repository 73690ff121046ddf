"""Tools of a chat: their schemas, the format of calls in a model's chat template, and a streaming parser of calls.

    chat template, rendered with an example call -> ToolFormat -> grammar of the answer
    text that follows the grammar -> ToolParser -> content and tool_calls

The model writes a call in the format of its chat template if that is JSON: {"name": ..., "arguments": {...}}.
"""

import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from jinja2 import Environment, TemplateError, meta
from pydantic import BaseModel, ConfigDict, Field

from acip_platform.serve.text.detokenizer import StopTexts
from acip_platform.serve.text.grammar import Grammars, json_rule, quoted

NAME = r"^[a-zA-Z0-9_-]{1,64}$"
MAX_TOOLS = 128
EXAMPLE_TOOL, EXAMPLE_ARGUMENT = "made_up_tool", "made_up_argument"


class Function(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(pattern=NAME, description="1 to 64 of the characters a-z, A-Z, 0-9, _ and -")
    description: str | None = Field(default=None, description="a text")
    parameters: dict[str, Any] | None = Field(default=None, description="a JSON schema of an object")
    strict: bool | None = Field(default=None, description="true or false: arguments follow the schema in any case")


class Tool(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["function"] = Field(description='"function"')
    function: Function = Field(description='an object like {"name": "f", "parameters": {"type": "object"}}')


class NamedFunction(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(description="the name of one of the tools")


class NamedTool(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["function"] = Field(description='"function"')
    function: NamedFunction = Field(description='an object like {"name": "f"}')


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True)
class ToolFormat:
    """The format of calls: marker open {before NAME between ARGUMENTS after} close suffix. If `always`, the answer has calls only."""

    marker: str = ""
    open: str = ""  # begins a list of calls
    before: str = '{"name": "'
    between: str = '", "arguments": '
    after: str = "}"
    close: str = ""
    suffix: str = ""
    always: bool = False

    @classmethod
    def of(cls, render: Callable[..., str], special: Sequence[str]) -> "ToolFormat | None":
        """Return the format of calls of a chat template, which `render` applies, or None if that format is not JSON."""
        question = [{"role": "user", "content": "a"}]
        call = {"id": "abcdefghi", "type": "function", "function": {"name": EXAMPLE_TOOL, "arguments": {EXAMPLE_ARGUMENT: 1}}}
        other = {"name": "other_tool", "description": "", "parameters": {"type": "object", "properties": {}}}
        tools = [{"type": "function", "function": other}]
        try:
            whole = render([*question, {"role": "assistant", "content": "", "tool_calls": [call]}], tools, False)
            prompt = render(question, tools, True)
        except Exception:  # the template does not support calls
            return cls()
        common = next((i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), min(len(whole), len(prompt)))
        written = whole[common:]
        if EXAMPLE_TOOL not in written or EXAMPLE_ARGUMENT not in written:
            return cls()
        form = re.search(
            rf'(?P<open>\[\s*)?(?P<before>\{{\s*"name"\s*:\s*"){EXAMPLE_TOOL}(?P<between>"\s*,\s*"(?:arguments|parameters)"\s*:\s*)'
            rf'\{{\s*"{EXAMPLE_ARGUMENT}"\s*:\s*1\s*\}}(?P<after>\s*\}})(?P<close>\s*\])?(?P<suffix>.*)',
            written.replace('\\"', '"'), re.DOTALL,
        )  # fmt: skip
        if form is None:
            return None
        marker = re.search(r"(<[^<>\s]+>|\[[A-Z_]+\])\s*$", written[: form.start()])
        suffix = form["suffix"]
        for name in special:
            suffix = suffix.partition(name)[0]
        paired = form["open"] and form["close"]
        return cls(
            marker[0] if marker else "", form["open"] if paired else "", form["before"], form["between"], form["after"],
            form["close"] if paired else "", suffix.rstrip() if marker else "",
        )  # fmt: skip

    def grammar(self, grammars: Grammars, tools: Sequence[Tool], parallel: bool, otherwise: str | None) -> str:
        """Return the Lark grammar of answers with these tools. `otherwise` is the alternative to a call; None allows calls only."""
        literal = grammars.literal
        objects = " | ".join(f"call_{i}" for i in range(len(tools)))
        rules = [
            f"call_{i}: {quoted(self.before + tool.function.name + self.between)} arguments_{i} {quoted(self.after)}\n"
            f"arguments_{i}: {json_rule(parameters(tool), 'tools')}"
            for i, tool in enumerate(tools)
        ]
        more = f' (", " ({objects}))*' if parallel and self.open else ""
        ends = self.close + self.suffix
        body = " ".join(
            part for part in (literal(self.open) if self.open else "", f"({objects}){more}", literal(ends) if ends else "") if part
        )
        marker = literal(self.marker) if self.marker else ""
        again = f' ("\\n" {marker} body)*' if parallel and marker and not self.open else ""
        if otherwise is None:
            start = f"{marker} body{again}"
        elif not marker:
            start, rules = "OTHER | body", [*rules, r"OTHER: /([^{](.|\n)*)?/"]
        elif otherwise != TEXT:
            start, rules = f"answer | {marker} body{again}", [*rules, f"answer: {otherwise}"]
        elif marker.startswith("<["):
            start, rules = f"TEXT? | TEXT? {marker} body{again}", [*rules, r"TEXT: /(.|\n)+/"]
        else:
            start, rules = f"TEXT | lead body{again}", [*rules, r"TEXT: /(.|\n)*/", rf"lead[lazy]: /(.|\n)*{_in_regex(self.marker)}/"]
        return "\n".join(["%llguidance {}", f"start: {start}", f"body: {body}", *rules])

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


TEXT = "text"  # any text


def parameters(tool: Tool) -> dict[str, Any]:
    return {"type": "object", **(tool.function.parameters or {"properties": {}})}


def has_tools(template: Any) -> bool:
    """Return whether a chat template, or one of several, uses tools."""
    for source in template.values() if isinstance(template, dict) else [template or ""]:
        try:
            if "tools" in meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)):  # noqa: S701
                return True
        except TemplateError:  # an extension of transformers, {% generation %}
            if re.search(r"\btools\b", source):
                return True
    return False


class ToolParser:
    """A streaming parser that splits the text of an answer into content and calls. It assumes that the text follows the grammar."""

    def __init__(self, form: ToolFormat) -> None:
        self.form = form
        self.calls = 0
        self._state = "head" if form.always and not form.marker else "text"
        self._marker = StopTexts([form.marker] if form.marker else [])
        self._buffer = ""
        self._depth, self._quoted, self._escaped = 0, False, False
        self._decided = bool(form.marker)

    def add(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Return the content and the deltas of tool calls that this text adds."""
        content, deltas = "", list[dict[str, Any]]()
        for character in text:
            if self._state == "text":
                content += self._text(character)
                if self._state == "text":
                    continue
                if self._decided and self.form.marker:
                    continue
            if self._state == "head":
                deltas += self._head(character)
            elif self._state == "arguments":
                deltas = _joined(deltas, self._arguments(character))
            elif self._state == "after":
                self._after(character)
        return content, deltas

    def end(self) -> str:
        """Return the content that was held back."""
        return "" if self._state != "text" or self.calls or self.form.always else self._marker.end()

    def _text(self, character: str) -> str:
        if not self._decided:
            self._decided = True
            if character == "{":
                self._state = "head"
                return ""
        content = self._marker.add(character)
        if self._marker.found:
            self._marker, self._state = StopTexts([self.form.marker]), "head"
        return "" if self.calls else content

    def _head(self, character: str) -> list[dict[str, Any]]:
        self._buffer += character
        start = (self.form.open if not self._buffer.startswith(self.form.before) else "") + self.form.before
        if not self._buffer.endswith(self.form.between) or len(self._buffer) < len(start + self.form.between):
            return []
        name = self._buffer[len(start) : -len(self.form.between)]
        self._buffer, self._state = "", "arguments"
        self.calls += 1
        function = {"name": name, "arguments": ""}
        return [{"index": self.calls - 1, "id": uuid.uuid4().hex[:9], "type": "function", "function": function}]

    def _arguments(self, character: str) -> dict[str, Any]:
        if self._quoted:
            self._quoted = self._escaped or character != '"'
            self._escaped = not self._escaped and character == "\\"
        else:
            self._quoted = character == '"'
            self._depth += (character in "{[") - (character in "}]")
        if self._depth == 0:
            self._state = "after"
        return {"index": self.calls - 1, "function": {"arguments": character}}

    def _after(self, character: str) -> None:
        self._buffer += character
        if self._buffer == f"{self.form.after}, " and self.form.open:
            self._buffer, self._state = "", "head"
        elif self._buffer == self.form.after + self.form.close + self.form.suffix:
            self._buffer, self._state = "", "text"


def _joined(deltas: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the deltas with one more, merged into the last if both belong to the same call."""
    if deltas and deltas[-1]["index"] == new["index"]:
        deltas[-1]["function"]["arguments"] += new["function"]["arguments"]
        return deltas
    return [*deltas, new]


def _in_regex(text: str) -> str:
    """Return the text escaped for a regular expression of Lark."""
    return re.sub(r"([.^$*+?()\[\]{}|\\/])", r"\\\1", text).replace("\n", "\\n")
