"""What ships with the package."""

from __future__ import annotations

from pathlib import Path

#: a vision transformer pre-trained on rendered glyphs by `scripts/pretrain_glyphs.py`
GLYPH_VIT = Path(__file__).resolve().parent / "glyph-vit"
