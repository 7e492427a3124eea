"""The marks between which models write reasoning and tool calls."""

from engine.types import ReplyKind

_REASONING, _TOOL_CALL = ReplyKind.REASONING, ReplyKind.TOOL_CALL
MARKS = (  # kind, start, end; without an end the stretch goes on to the end of the reply
    (_REASONING, "<think>", "</think>"),
    (_REASONING, "<thinking>", "</thinking>"),
    (_REASONING, "[THINK]", "[/THINK]"),
    (_REASONING, "<seed:think>", "</seed:think>"),
    (_TOOL_CALL, "<tool_call>", "</tool_call>"),
    (_TOOL_CALL, "<|tool_call|>", "<|/tool_call|>"),
    (_TOOL_CALL, "<|tool_call_start|>", "<|tool_call_end|>"),
    (_TOOL_CALL, "<start_function_call>", "<end_function_call>"),
    (_TOOL_CALL, "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    (_TOOL_CALL, "[TOOL_CALLS]", None),
    (_TOOL_CALL, "<|python_tag|>", None),
)
INSIDE = ("[ARGS]", "[CALL_ID]", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>")
"""What divides the inside of a tool call."""

OF_REPLIES = frozenset(text for _, *pair in MARKS for text in pair if text) | set(INSIDE)
"""Control tokens that belong to what a model says, as those of a template belong to what is around it."""
