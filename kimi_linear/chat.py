"""Chat templates: read from the checkpoint, run in jinja2's sandbox, and stopped when they make too much."""

import json
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from kimi_linear.tokenizer import SETTINGS

TEMPLATE = "chat_template.jinja"
TEMPLATE_LIMIT = 2**20
"""Bytes of a template that is read."""
TEXT_LIMIT = 2**24
"""Characters that a template may make, at once or one after the other."""
RANGE_LIMIT = 10**5
"""Numbers that the ranges of one rendering may have, together."""


PADDING = frozenset(("ljust", "rjust", "center", "zfill", "expandtabs", "format", "format_map"))
"""Methods and filters that make any amount of text out of a number."""


class ChatError(ValueError):
    """A checkpoint without a usable template, or a conversation that its template refuses."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox without products, powers and paddings that fill the memory."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def is_safe_attribute(self, obj, attr, value) -> bool:
        """Refuse the methods that pad text to any width, beside what the sandbox refuses."""
        return attr not in PADDING and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context, operator, left, right):
        """Multiply numbers; repeat text and lists up to the limit."""
        if operator == "**" or (operator == "%" and isinstance(left, str | bytes)):
            raise SecurityError("templates may neither raise to powers nor format by %")
        for whole, times in ((left, right), (right, left)):
            if hasattr(whole, "__len__") and isinstance(times, int) and len(whole) * times > TEXT_LIMIT:
                raise SecurityError(f"templates may make at most {TEXT_LIMIT} characters")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A template of a checkpoint."""

    def __init__(self, source: str):
        """Compile a template; ChatError where it is none or is longer than TEMPLATE_LIMIT."""
        if len(source.encode()) > TEMPLATE_LIMIT:
            raise ChatError(f"expected a template of at most {TEMPLATE_LIMIT} bytes, got {len(source.encode())}")
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters = {name: x for name, x in environment.filters.items() if name not in PADDING | {"indent"}}
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refused
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatError(f"the template cannot be read: {error}") from error

    @classmethod
    def read(cls, folder: str | Path) -> "ChatTemplate":
        """Read the template of a checkpoint: chat_template.jinja, or chat_template in tokenizer_config.json."""
        folder = Path(folder)
        if (folder / TEMPLATE).is_file():
            return cls((folder / TEMPLATE).read_text(encoding="utf-8"))
        if (folder / SETTINGS).is_file():
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            if isinstance(settings, dict) and isinstance(found := settings.get("chat_template"), str):
                return cls(found)
        raise ChatError(f"{folder} has no chat template: expected {TEMPLATE}, or chat_template in {SETTINGS}")

    def render(
        self, messages: list[dict], *, tools: list[dict] | None = None, add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a conversation, with the beginning of the answer where add_generation_prompt.

        Special tokens stand in it by name, those in the messages too: who renders what strangers wrote checks it.
        ChatError where the template refuses, fails, or makes more than TEXT_LIMIT characters.
        """
        variables = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        parts, size = [], 0
        try:
            for part in self._template.generate(**variables, range=_Range()):
                size += len(part)
                if size > TEXT_LIMIT:
                    raise ChatError(f"the template made more than {TEXT_LIMIT} characters")
                parts.append(part)
        except ChatError:
            raise
        except Exception as error:  # a template may fail in any way
            raise ChatError(f"the template failed: {type(error).__name__}: {error}") from error
        return "".join(parts)


class _Range:
    """`range` with a budget for one rendering."""

    def __init__(self):
        self.left = RANGE_LIMIT

    def __call__(self, *bounds: int) -> range:
        """Return a range, or refuse."""
        found = range(*bounds)
        self.left -= len(found)
        if self.left < 0:
            raise SecurityError(f"templates may count to {RANGE_LIMIT} in all")
        return found


def _to_json(value, indent=None, separators=None, ensure_ascii: bool = False, sort_keys: bool = False) -> str:
    """Return JSON without HTML's escapes, as prompts hold it."""
    separators = tuple(separators) if separators is not None else None
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refused(message: str):
    raise ChatError(f"the template refuses: {message}")
