"""Whether the Hugging Face hub can be reached: checked first, because its client retries for minutes."""

from __future__ import annotations

_PROBE_TIMEOUT_S = 8.0


def hub_reachable() -> bool:
    """Whether the hub (or its mirror HF_ENDPOINT) answers within seconds, through a proxy where one is set."""
    import huggingface_hub.constants as hub
    from huggingface_hub import get_session

    if hub.HF_HUB_OFFLINE:
        return False
    try:
        return bool(get_session().head(hub.ENDPOINT, timeout=_PROBE_TIMEOUT_S).status_code < 500)
    except Exception:  # the client's own kinds of network errors, which change with its version: all of them mean no
        return False
