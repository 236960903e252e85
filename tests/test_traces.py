"""Traces that tests share are those that each model would have."""

import pytest
import torch
from cases import BY_NAME, randomised
from quick import rest_slow
from traces import architecture, shared

from snows_hf.adapters import build_chain, outputs_of, trace


QUICK = {"timm-vit", "transformers-clip", "cifar-resnet8", "timm-mobilenet-skip"}


@pytest.mark.parametrize("name", rest_slow(BY_NAME, QUICK))
def test_a_chain_from_another_models_trace_is_the_models_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, asked = trace.exported.__wrapped__, 0

    def export(part: trace.ImagePart, image: torch.Tensor) -> torch.fx.GraphModule:
        nonlocal asked
        asked += 1
        return own(part, image)

    monkeypatch.setattr(trace, "exported", shared(export))
    case = BY_NAME[name]
    build_chain(case.model(), case.images(1))
    other = randomised(case.model(), seed=7)
    chain = build_chain(other, case.images(1))
    assert asked == 1
    with torch.no_grad():
        torch.testing.assert_close(chain.results_of(case.images()), outputs_of(other, case.images()))


def test_another_architecture_has_another_name() -> None:
    names = [architecture(case.model(), case.images(1)) for case in BY_NAME.values()]
    assert len(set(names)) == len(names)
    case = BY_NAME["timm-vit"]
    model = case.model()
    for image in (case.images(1).double(), case.images(1)[..., :8]):
        assert architecture(model, image) != architecture(model, case.images(1))
    model.blocks[0].attn.fused_attn = not model.blocks[0].attn.fused_attn
    assert architecture(model, case.images(1)) not in names
