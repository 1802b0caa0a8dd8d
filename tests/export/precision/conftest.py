"""Fixtures of the precision tests: one small network that was fitted, and its answers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.support_precision import Net, body, fitted, pictures
from tldist.export.precision.graphs import with_names
from tldist.export.precision.running import open_proto, run
from tldist.export.profile import Profile, find_profile


@pytest.fixture(scope="session")
def net() -> onnx.ModelProto:
    """A fitted network with convolutions, a gate, hard-swish and a residual. Not to be changed."""
    made = Net()
    return with_names(fitted(made, body(made)))


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """200 pictures that it was not fitted on."""
    return pictures(200, seed=1)[0]


@pytest.fixture(scope="session")
def logits(net: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Its answers in float32."""
    return run(open_proto(net), images)["logits"]


@pytest.fixture(scope="session")
def fp16_on_cpu() -> Profile:
    """The fp16 profile on the provider that is here."""
    return find_profile("cuda-fp16").model_copy(
        update={"provider": "CPUExecutionProvider", "provider_options": {}}
    )
