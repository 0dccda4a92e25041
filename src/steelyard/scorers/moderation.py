"""The categories of the moderation scorers, and their canaries."""

from __future__ import annotations

from pathlib import Path

CATEGORIES = ("toxicity", "identity_attack", "threat", "sexual")
CANARIES = Path(__file__).with_name("moderation_canaries.jsonl")
