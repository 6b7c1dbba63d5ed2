"""What a token is: its segment of the problem, and its role in a text that two tokenizers share.

A role is a stretch of the shared text, or one of those tokens that stand around it.
"""

from __future__ import annotations

PADDING, PROMPT, REASONING, ANSWER = 0, 1, 2, 3
SEGMENT_NAMES = {"prompt": PROMPT, "reasoning": REASONING, "answer": ANSWER}

PADDING_ROLE = 0
TEXT = 1  # stands for characters of the shared text
START = 2  # before it: beginning-of-text, a chat template's opening
TURN = 3  # between prompt and completion: a chat template's turn
END = 4  # after it: end-of-text, the end of the turn
UNKNOWN = 5  # a stretch of it that the tokenizer cannot write: the token says only that something is there
