import os

import pytest

from tests.support import ROOT, WordProcessor


# what tests start as a process imports `tests.support` too
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@pytest.fixture
def word_processor():
    return WordProcessor()


@pytest.fixture
def no_bars():
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
