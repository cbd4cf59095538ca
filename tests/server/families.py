"""Chat templates that teach tools, in the manner of each family, and what a model of it would say."""

from __future__ import annotations

from typing import Any

TURNS = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}CALL{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def taught(form: str, call: str) -> str:
    """A template that lists the tools, each as JSON, says the form's mark, and writes calls in it."""
    return (
        "{%- if tools %}{% for tool in tools %}TOOL {{ tool | tojson }}\n{% endfor %}" + form + "{% endif %}" + TURNS.replace("CALL", call)
    )


NAME, ARGUMENTS = "{{ call.function.name }}", "{{ call.function.arguments | tojson }}"
TEMPLATES = {
    "hermes": taught("Write <tool_call>.", f'<tool_call>\n{{"name": "{NAME}", "arguments": {ARGUMENTS}}}\n</tool_call>'),
    "llama3": taught("Environment: ipython", f'{{"name": "{NAME}", "parameters": {ARGUMENTS}}}'),
    "mistral": taught("[AVAILABLE_TOOLS]", f'[TOOL_CALLS] [{{"name": "{NAME}", "arguments": {ARGUMENTS}, "id": "{{{{ call.id }}}}"}}]'),
    "mistral_named": taught("[AVAILABLE_TOOLS]", f"[TOOL_CALLS]{NAME}[ARGS]{ARGUMENTS}"),
    "json": taught("Write JSON.", f'{{"name": "{NAME}", "arguments": {ARGUMENTS}}}'),
}
MARKS = ("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]")
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
TOOL: Any = {"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": PARAMETERS}}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
TOOLS: Any = [TOOL, CLOCK]
CITY = '{"city": "Köln"}'
SAID = {
    "hermes": (
        f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {CITY}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "clock"}\n</tool_call>'
    ),
    "llama3": f'{{"name": "get_weather", "parameters": {CITY}}}; {{"name": "clock", "parameters": {{}}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {CITY}}}, {{"name": "clock", "arguments": {{}}}}]',
    "mistral_named": f"Let me see.\n[TOOL_CALLS]get_weather[ARGS]{CITY}[TOOL_CALLS]clock[ARGS]{{}}",
    "json": f'[{{"name": "get_weather", "arguments": {CITY}}}, {{"name": "clock", "arguments": {{}}}}]',
}
CALLS = [("get_weather", CITY), ("clock", "{}")]
