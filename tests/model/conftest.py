from __future__ import annotations

import pytest

import editing
import models


@pytest.fixture
def llama():
    return models.llama()


@pytest.fixture(params=editing.LISTED)
def listed(request):
    return request.param, editing.ALL[request.param](), editing.batch_for(request.param)
