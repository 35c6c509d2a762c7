"""What counts as a table of tokens that can be looked up by its rows alone."""

import pytest
import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledEmbedding

from lorq.models.tables import is_lookup


class Positions(nn.Embedding):
    def forward(self, input):
        return super().forward(input) + torch.arange(input.shape[-1])[:, None]


class ByToken(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * (input > 0)[..., None]


class Narrow(nn.Embedding):
    def forward(self, input):
        return super().forward(input)[..., :2]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (nn.Embedding(9, 4, padding_idx=8), True),
        (Gemma3TextScaledWordEmbedding(9, 4, 8, embed_scale=3.0), True),
        (BartScaledWordEmbedding(9, 4, 8, embed_scale=3.0), True),
        (Positions(9, 4), True),  # of the place alone, which is the same for the rows by themselves
        (ByToken(9, 4), False),
        (Narrow(9, 4), False),
        (nn.Embedding(9, 4, max_norm=1.0), False),
        (IdeficsDecoupledEmbedding(9, 2, 4), False),
        (nn.Linear(4, 9), False),
    ],
    ids=["plain", "gemma", "bart", "positions", "by token", "narrow", "max norm", "idefics", "linear"],
)
def test_a_table_is_looked_up_by_rows_if_its_rows_are_all_that_its_class_looks_at(table, expected):
    weight = {name: parameter.clone() for name, parameter in table.named_parameters()}
    assert is_lookup(table) is expected
    assert all(torch.equal(parameter, weight[name]) for name, parameter in table.named_parameters())
    assert getattr(table, "padding_idx", None) in (8, None)
