"""What holds for every test: objects that earlier modules left are no concern of later ones."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _frozen_past():
    """What lives when a module begins (libraries, their caches) is not looked at again.

    The first step of an optimizer looks at all objects of the process, of which a long test session has millions.
    """
    gc.collect()
    gc.freeze()
