"""What every distance has in common, whatever it looks at: it is made from a recipe and says what it must be given.

    neither                   distance(source [.., T, C], target [.., T, C])              keys and values apart
    needs_mask                distance(source [L, B, T, C], target [L, B, T, C'], mask)   keys and values apart
    needs_queries, needs_mask distance(QKV, QKV, mask)                                    keys and values together

Each returns one number a token, [L, B, T], which `masked_token_mean` makes into a term of the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from kvdistill.core.recipe import LossRecipe


class AbstractDistance(ABC):
    """needs_queries: takes queries, keys and values of both sides together. needs_mask: takes the tokens' mask."""

    needs_queries: ClassVar[bool] = False
    needs_mask: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def from_recipe(cls, recipe: LossRecipe) -> AbstractDistance:
        """The distance with the settings of `recipe`."""

    if TYPE_CHECKING:  # what it takes differs (above); what it gives does not
        __call__: Callable[..., Tensor]
