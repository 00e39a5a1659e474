"""What a compressed prompt may cost, counted by encoding it again."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import SpecPC
from ..errors import BudgetError
from ..types import PromptTokens
from .select import token_budget


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit in draft tokens: of the whole prompt (`capacity`), or of its passages (`ratio`)."""

    limit: int
    whole_prompt: bool

    @classmethod
    def of(cls, method: SpecPC, tokens: PromptTokens) -> Budget:
        """The integer budget of this prompt."""
        passage_tokens = int((~tokens.protected).sum())
        return cls(token_budget(method, passage_tokens), method.ratio is None)

    def measure(self, tokens: PromptTokens) -> int:
        """Size of a prompt as this budget counts."""
        return len(tokens) if self.whole_prompt else int((~tokens.protected).sum())

    def first_guess(self, tokens: PromptTokens) -> int:
        """Passage tokens that fit if nothing but them changes."""
        return self.limit - (int(tokens.protected.sum()) if self.whole_prompt else 0)

    def require_room(self, fixed: int) -> None:
        """Raise `BudgetError` where the prompt without passages exceeds the capacity."""
        if self.whole_prompt and fixed > self.limit:
            raise BudgetError(
                f"capacity={self.limit}, but the question, system text and template alone take "
                f"{fixed} draft tokens. Raise the capacity, or give a ratio of the passages."
            )
