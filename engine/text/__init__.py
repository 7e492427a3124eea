"""Text at the edge of the engine: tokenizer, chat template, the prompt of one turn, streaming detokenisation.

All of it is pure functions, objects that threads may share, and one small object per reply.
"""
