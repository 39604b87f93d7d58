"""An instruction belongs to the site that JAX's name for it says, and to no other."""

from __future__ import annotations

import pytest

from experiments import bert_tiny_mlm
from lmjax.hlo.scopes import Scope, scope_of
from lmjax.model import layout

STEP = "jit(step)/while/body/closed_call"
PARTS = ("optimizer", "loss_scale")


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("jvp()/while/body/blocks/0-1/mlp/up/dot_general", Scope("blocks/mlp/up", "0-1")),
        (
            "transpose(jvp())/while/body/blocks/1/attention/query/blocks/1/attention/query/mul",
            Scope("blocks/attention/query", "1", backward=True),
        ),
        ("jvp(head)/dot_general", Scope("head")),
        ("transpose(jvp(head))/head/dot_general", Scope("head", backward=True)),
        ("jvp(blocks/0-1/attention/norm)/rsqrt", Scope("blocks/attention/norm", "0-1")),
        ("jvp(norm)/rsqrt", Scope("norm")),
        ("optimizer/add", Scope("optimizer")),
        ("optimizer/jit(norm)/sqrt", Scope("optimizer")),
        ("jit(head)/add", None),
        ("blocks/0/mlp/pool/add", None),
        ("jvp()/while/body/add", None),
    ],
)
def test_a_name_leads_to_its_site(name: str, scope: Scope | None, tiny):
    assert scope_of(f"{STEP}/{name}", layout(tiny().model), PARTS) == scope


def test_a_part_outside_of_the_stack_may_have_sites_of_its_own():
    places = layout(bert_tiny_mlm.config().model)
    names = {"jvp(transform/dense)/y/dot_general": "transform/dense", "jvp(norm)/mul": "norm"}
    for name, path in names.items():
        assert scope_of(f"{STEP}/{name}", places, PARTS) == Scope(path)
