"""Where time goes: intervals and names by hand, and a trace of a real arm."""

import re

import pytest

from kdq import config, experiment
from kdq.config import ConfigError
from kdq.experiment.profiling import covered, names_of

PROGRAM = """
%fused_computation.1 (p: f32[4]) -> f32[4] {
  %a = f32[4]{0} add(%p, %p), metadata={op_name="jit(train_step)/jvp(CNN)/conv_0/add"}
  ROOT %c = f32[4]{0} dot(%a, %p), metadata={op_name="jit(train_step)/transpose(jvp(CNN))/head/dot"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %lone = f32[4]{0} multiply(%x, %x), metadata={op_name="jit(train_step)/cond/mul" stack_frame_id=3}
  %unnamed = f32[4]{0} copy(%x)
  ROOT %fusion.7 = f32[4]{0} fusion(%lone), kind=kCustom, calls=%fused_computation.1
}
"""


def test_the_union_of_intervals():
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 4.0
    assert covered([]) == 0.0


def test_operations_are_named_by_layer_and_fusions_by_their_product():
    found = names_of(PROGRAM)
    assert found["fusion.7"] == found["c"] == "backward head/dot"
    assert found["a"] == "forward conv_0/add"
    assert found["lone"] == "other cond/mul"
    assert "unnamed" not in found


def test_a_trace_names_the_layers_and_leaves_no_result(tiny_config, tmp_path):
    frozen = config.freeze(tiny_config())
    found = experiment.profile(frozen, tmp_path, "kd", seed=0, steps=5)
    assert 0 < found.inside <= found.step
    assert 0 <= found.outside < 1
    assert list(found.costs.values()) == sorted(found.costs.values(), reverse=True)
    layers = " ".join(found.costs)
    assert re.search(r"(forward|backward) conv_\d/", layers)
    assert found.trace.is_file()
    assert (tmp_path / "teacher" / "0" / "result.json").is_file()  # it was needed
    assert not (tmp_path / "kd" / "0" / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("ptq", "ptq.epochs=0: it is not trained"),
        ("qat", "trains for 8 steps: expected 15"),
        ("nil", "unknown arm 'nil'"),
    ],
)
def test_arms_without_so_many_steps(tiny_config, tmp_path, arm, message):
    with pytest.raises(ConfigError, match=message):
        experiment.profile(config.freeze(tiny_config()), tmp_path, arm, seed=0, steps=5)
