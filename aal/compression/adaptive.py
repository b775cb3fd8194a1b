"""Our own method."""

from __future__ import annotations

from aal.compression.codecs import Codec, Groups
from aal.compression.method import Keep, Method, Use


class Adaptive(Method):
    """Work in progress."""

    name = "adaptive"
    recipes = True

    def __init__(self, bits: float = 4):
        self.bits = bits

    def values(self, use: Use) -> Codec | Keep:
        return Groups(int(use.handle.site.state.get("bits", self.bits)))
