"""Projectors between two models' heads and head sizes, for K or for V, all layers in one call.

Direction does not matter here: `in` may be the student's heads and `out` the teacher's, or the other way round, and
any two numbers of heads go together. Tensors come and go with heads side by side, [L, ..., heads·size], which is how
both models store them per token. Every tensor of a projector's state has a leading layer axis P: one row per layer,
or a single row that all layers share.

  flat.py        KVDimensionProjector  one linear map over all heads at once
                 LowRankProjector      the same as two thin matrices
  structured.py  HeadwiseMapProjector  a head mixer, then a map of the head size (shared or one per outgoing head)
  elastic.py     ElasticProjector      norm, then a small MLP over all heads; the only one that is not linear
  residual.py    ResidualProjector     a fixed first guess + gate · any of these
  choose.py      `make_projector`, from the recipe's words; `convert`, where two kinds can be the same function
"""

from kvdistill.align.heads.base import AbstractHeadProjector
from kvdistill.align.heads.choose import PROJECTORS, convert, make_projector
from kvdistill.align.heads.elastic import ElasticProjector
from kvdistill.align.heads.flat import KVDimensionProjector, LowRankProjector
from kvdistill.align.heads.initial import make_matrix, spread_heads
from kvdistill.align.heads.residual import ResidualProjector
from kvdistill.align.heads.structured import HeadwiseMapProjector
