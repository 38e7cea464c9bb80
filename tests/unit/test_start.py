"""What the start does to the process as a whole."""

import gc

import pytest

from service.__main__ import garbage_collector_off


def test_garbage_is_collected_again_after_the_imports() -> None:
    with garbage_collector_off():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), garbage_collector_off():
        raise ImportError
    assert gc.isenabled()
