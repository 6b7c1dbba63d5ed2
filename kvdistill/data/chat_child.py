"""The program in which `chat.py` renders chat templates: a publisher's code, which may loop or grow without end.

`limited_child.py` holds its limits. Renders as `apply_chat_template` does, by the same function of transformers.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LONGEST = 1 << 24  # characters of a rendering


def main() -> None:
    runpy.run_path(str(Path(__file__).with_name("limited_child.py")))["serve"](load)


def load() -> Callable[[dict[str, Any]], tuple[str, str]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(question: dict[str, Any]) -> tuple[str, str]:
        """(`text`, the rendering) or (`error`, why there is none)."""
        messages, tokens = question.pop("messages"), question.pop("tokens")
        try:
            rendered: Any = render_jinja_template(conversations=[messages], **question, **tokens)
            text = str(rendered[0][0])
        except MemoryError:
            return "error", "it takes too much memory"
        except Exception as error:  # the template's own code: whatever it raises is its failure
            return "error", (str(error).strip() or type(error).__name__)[:2000]
        if len(text) > _LONGEST:
            return "error", f"it writes {len(text):,} characters"
        return "text", text

    return render


if __name__ == "__main__":
    main()
