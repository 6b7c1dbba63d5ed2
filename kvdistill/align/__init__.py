"""Alignment: any teacher's keys and values brought to any student's tokens, layers, heads and sizes.

    tokens.py    which teacher tokens stand behind each student token, by characters (other tokenizers)
    time.py      the same by place: index, pad, proportional, segment
    layers.py    which teacher layers stand behind each student layer
    heads/       projectors between heads and head sizes; ridge.py, attention.py, fitting.py: their closed forms
    channels.py  channel statistics
    shared/      one space for models of any architecture
    aligner.py   all of it for one teacher, in one written order; sides.py: as attention multiplies it

None of them knows a model, a file or a loss.
"""

from __future__ import annotations

from kvdistill.align.aligner import AlignedKV, MapProjectionAligner
from kvdistill.align.channels import ChannelStatistics, KVStatistics
from kvdistill.align.heads import HeadwiseMapProjector, KVDimensionProjector, convert
from kvdistill.align.layers import CKALayerMapper, layer_map, needed_teacher_layers, parse_layer_range
from kvdistill.align.ridge import RidgeFit
from kvdistill.align.shared import SharedSpace, SharedSpaceFit
from kvdistill.align.sides import attention_rules, attention_sources, attention_targets
from kvdistill.align.time import SegmentIdentifier, TimeWarper, time_map
